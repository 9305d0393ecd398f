"""A finished student in the engine: exported, evaluated by the code that evaluates torch models, and compared."""

from pathlib import Path

from .config import Recipe
from .data.prompts import PromptEncoder
from .data.tasks import Task
from .engine import Engine, EngineScorer
from .evaluate import Evaluation, Scorer, evaluate_classification, evaluate_generation
from .train.loading import load_tokenizer

PREFILL_TOKENS = 128
DECODE_TOKENS = 64


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
