"""A finished student in the engine: exported, evaluated by the code that evaluates torch models, and compared."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from . import _core
from .config import Recipe
from .data.tasks import Task
from .engine import Engine, EngineScorer
from .engine.engine import CacheChoice
from .export import export
from .metrics import Evaluation
from .pipeline import evaluate_scorer, evaluate_step, heldout_sequences
from .train.loading import load_model, load_tokenizer
from .train.size import model_size

DECODE_TOKENS = 64
"""Tokens of the speed figures of a record; ``bitdistill bench`` measures properly."""


def evaluate_engine(
    recipe: Recipe, task: Task, model: str | Path, split: str, *, kv_cache: CacheChoice = "auto"
) -> Evaluation:
    """Evaluate an exported model on ``validation`` or ``test``.

    Raises:
        CheckpointError: it is not an exported model, or damaged.
    """
    engine = Engine(model, kv_cache=kv_cache)
    return evaluate_scorer(recipe, task, EngineScorer(engine), load_tokenizer(model), split)


def engine_perplexity(recipe: Recipe, model: str | Path, *, kv_cache: CacheChoice = "auto") -> float:
    """Perplexity of an exported model on the part of the corpus that no training step reads.

    Raises:
        CheckpointError: it is not an exported model, or damaged.
    """
    engine = Engine(model, kv_cache=kv_cache)
    sequences = heldout_sequences(recipe, load_tokenizer(model))
    rows = (sequences[i]["input_ids"].tolist() for i in range(len(sequences)))
    return EngineScorer(engine).perplexity(rows)


def engine_record(recipe: Recipe, task: Task, student: Path, full_precision: Path) -> dict[str, Any]:
    """Export a finished student beside itself, evaluate it in the engine, and compare with torch and with the teacher.

    Returns:
        Accuracy, the decisions that differ from torch's, bytes, and speeds; see ``docs/format.md`` for the folder.
    """
    folder = student.with_name(f"{student.name}-packed")
    facts = export(student, folder, head="f32")
    engine = Engine(folder, kv_cache="fp32")
    ours = evaluate_scorer(recipe, task, EngineScorer(engine), load_tokenizer(folder), "test")
    theirs = evaluate_step(recipe, task, student, "test")  # stands in the step's folder already
    different = [i for i, (a, b) in enumerate(zip(ours.items, theirs.items, strict=True)) if a != b]
    dense = load_model(full_precision)
    return {
        "folder": str(folder),
        ours.metric: ours.value,
        f"torch_{theirs.metric}": theirs.value,
        "items": len(ours.items),
        "outcomes_that_differ": different,
        "bytes": facts["bytes"],
        "full_precision_bytes": model_size(dense).bytes,
        "isa": engine.core.isa,
        "threads": engine.core.threads,
        "decode_tok_s": _decode_tok_s(engine),
        "full_precision_decode_tok_s": _torch_decode_tok_s(dense),
    }


def _decode_tok_s(engine: Engine) -> float:
    session, sampler = engine.session(), _core.Sampler()
    session.forward(np.zeros(4, np.int32))
    session.decode(sampler, 4)  # threads and pages wake up
    started = time.perf_counter()
    session.decode(sampler, DECODE_TOKENS)
    return DECODE_TOKENS / (time.perf_counter() - started)


def _torch_decode_tok_s(model: Any) -> float:
    """The full-precision model in torch with its own cache, greedy, one text at a time, as the engine decodes."""
    import torch

    ids = torch.zeros(1, 4, dtype=torch.int64)
    options = {
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "attention_mask": torch.ones_like(ids),
    }
    model.eval()
    model.generate(ids, max_new_tokens=4, **options)
    started = time.perf_counter()
    model.generate(ids, max_new_tokens=DECODE_TOKENS, **options)
    return DECODE_TOKENS / (time.perf_counter() - started)
