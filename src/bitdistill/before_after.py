"""A model before and after its vocabulary was trimmed, on texts that the vocabulary was not chosen by."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import pipeline
from .config import CorpusConfig, Recipe
from .data.corpus import leading_ids
from .data.seen import example_ids, held_out_texts, text_ids
from .data.tasks import load_task
from .evaluate import TorchScorer
from .packed import read_json_object
from .train.loading import load_model, load_tokenizer
from .trim import MAPPING_FILE

SLICE = 256
"""Characters of a text that are scored together: the same for both vocabularies, and short enough for any context."""


def compare(
    source: str | Path,
    trimmed: Path,
    *,
    recipe: Recipe | None = None,
    held_out: CorpusConfig | None = None,
    models: bool = True,
) -> dict[str, Any]:
    """What trimming changed on the recipe's test split and on held-out texts.

    Returns:
        Under ``task`` and ``held_out``: ``examples``, ``same_tokens`` (share of those that come out as the same tokens
        as before), ``tokens_before`` and ``tokens`` of an example in the mean; with ``models`` the task's metric and
        ``outcomes_that_differ``, or ``bits_per_byte``, of both models in torch.

    Raises:
        DataError: there are no held-out data.
    """
    old_ids = read_json_object(trimmed / MAPPING_FILE)["old_ids"]
    revision = recipe.revision_of(source) if recipe else None
    was, now = load_tokenizer(source, revision), load_tokenizer(trimmed)
    result: dict[str, Any] = {}
    if recipe is not None:
        task = load_task(recipe.task)
        found = _tokens(example_ids(task, task.test, was), example_ids(task, task.test, now), old_ids)
        if models:
            before, after = (pipeline.evaluate_model(recipe, task, m, "test") for m in (source, trimmed))
            pairs = zip(before.items, after.items, strict=True)
            found |= {
                "metric": before.metric,
                "metric_before": before.value,
                "metric_after": after.value,
                "outcomes_that_differ": sum(a != b for a, b in pairs),
            }
        result["task"] = found
    if held_out is not None:
        texts = held_out_texts(held_out)
        found = _tokens(text_ids(texts, was), text_ids(texts, now), old_ids)
        if models:
            found["bits_per_byte_before"] = bits_per_byte(source, texts, revision)
            found["bits_per_byte"] = bits_per_byte(trimmed, texts)
        result["held_out"] = found
    return result


def _tokens(
    before: Iterable[list[int]], after: Iterable[list[int]], old_ids: Sequence[int]
) -> dict[str, Any]:
    examples = same = tokens_before = tokens = 0
    for old, new in zip(before, after, strict=True):
        examples += 1
        same += old == [old_ids[i] for i in new]
        tokens_before += len(old)
        tokens += len(new)
    return {
        "examples": examples,
        "same_tokens": same / examples,
        "tokens_before": tokens_before / examples,
        "tokens": tokens / examples,
    }


def bits_per_byte(source: str | Path, texts: Sequence[str], revision: str | None = None) -> float:
    """Bits that a model takes for a byte of UTF-8, which vocabularies can be compared by as perplexities cannot.

    Every slice of a text is scored on its own, behind the begin-of-text token (end-of-text where there is none).
    """
    tokenizer = load_tokenizer(source, revision)
    start = leading_ids(tokenizer) or [tokenizer.eos_token_id]
    slices = [text[i : i + SLICE] for text in texts for i in range(0, len(text), SLICE)]
    rows = tokenizer(slices, add_special_tokens=False, verbose=False)["input_ids"]
    scorer = TorchScorer(load_model(source, revision), tokenizer)
    nats = -sum(scorer.log_likelihoods([(start, list(ids)) for ids in rows if ids]))
    return nats / math.log(2) / sum(len(text.encode()) for text in slices)
