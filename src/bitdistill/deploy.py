"""A finished student in the engine: exported, evaluated by the code that evaluates torch models, and compared."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from . import _core
from .config import Recipe
from .data.prompts import PromptEncoder
from .data.tasks import Task
from .engine import Engine, EngineScorer
from .evaluate import Evaluation, Scorer, TorchScorer, evaluate_classification, evaluate_generation
from .export import export
from .train.loading import load_model, load_tokenizer

DECODE_TOKENS = 64
"""Tokens of the speed figures of a record; ``bitdistill bench`` measures properly."""


def evaluate_engine(
    recipe: Recipe, task: Task, model: str | Path, split: str, *, exact: bool = False
) -> Evaluation:
    """Evaluate an exported model on ``validation`` or ``test``.

    Raises:
        CheckpointError: it is not an exported model, or damaged.
    """
    engine = Engine(model, exact=exact)
    return _evaluate(recipe, task, model, EngineScorer(engine), split)


def _evaluate(recipe: Recipe, task: Task, model: str | Path, scorer: Scorer, split: str) -> Evaluation:
    encoder = PromptEncoder(load_tokenizer(model), recipe.task.max_length)
    examples = task.test if split == "test" else task.validation
    if task.kind == "generation":
        return evaluate_generation(scorer, encoder, examples, recipe.task.max_new_tokens)
    return evaluate_classification(scorer, encoder, examples, task.labels)


def engine_record(recipe: Recipe, task: Task, student: Path, full_precision: Path) -> dict[str, Any]:
    """Export a finished student beside itself, evaluate it in the engine, and compare with torch and with the teacher.

    Returns:
        Accuracy, the decisions that differ from torch's, bytes, and speeds; see ``docs/format.md`` for the folder.
    """
    folder = student.with_name(f"{student.name}-packed")
    facts = export(student, folder, head="f32")
    engine = Engine(folder, exact=True)
    torch_scorer = TorchScorer(load_model(student), load_tokenizer(student))
    ours = _evaluate(recipe, task, folder, EngineScorer(engine), "test")
    theirs = _evaluate(recipe, task, student, torch_scorer, "test")
    different = [i for i, (a, b) in enumerate(zip(ours.correct, theirs.correct, strict=True)) if a != b]
    dense = load_model(full_precision)
    return {
        "folder": str(folder),
        ours.metric: ours.value,
        f"torch_{theirs.metric}": theirs.value,
        "items": len(ours.correct),
        "outcomes_that_differ": different,
        "bytes": facts["bytes"],
        "full_precision_bytes": 2 * sum(p.numel() for p in dense.parameters()),
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
