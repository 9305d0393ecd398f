"""How many tokens a task has: counted where data and tokenizer are at hand, bounded from above where they are not."""

import logging
from dataclasses import dataclass
from pathlib import Path

from ..config import DistillConfig, Recipe, SftConfig, TaskConfig
from ..data.prompts import Encoded
from ..data.tasks import Task, load_task
from ..errors import CheckpointError
from ..train.batches import SeededOrder
from ..train.loading import load_tokenizer
from ..train.sft import task_sequences
from .models import source_folder

logger = logging.getLogger(__name__)

PUBLISHED_ROWS = {
    "sst2": 67_349,
    "qnli": 104_743,
    "mnli": 392_702,
    "mnli_mismatched": 392_702,
    "cnndm": 287_113,
}
"""Training rows of the built-in tasks, as their data sets were published."""


@dataclass(frozen=True)
class TaskTokens:
    """The training part of a task, as a student reads it."""

    examples: int
    longest: int
    """Tokens of the longest example."""
    labelled: float
    """Tokens of an example that are learnt, on average."""
    most_labelled: int
    basis: str
    """Where the figures come from."""
    encoded: tuple[Encoded, ...] = ()
    """The examples, where they are at hand."""

    def per_epoch(self, config: SftConfig | DistillConfig, seed: int, processes: int) -> int:
        """Tokens that are computed in the first epoch, padding included."""
        if not self.encoded:
            return self.examples * self.longest
        lengths = [len(example) for example in self.encoded]
        size = config.batch_size * config.gradient_accumulation_steps * processes
        order = SeededOrder(len(lengths), seed, batch_size=size, steps=1, lengths=lengths).epoch(0)
        batches = (order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size))
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)


def task_tokens(recipe: Recipe) -> TaskTokens:
    """Count a task that is a folder or generated here; bound one that is on the hub, which is not asked.

    Raises:
        DataError, ConfigError: the task's folder or settings are not right.
    """
    config = recipe.task
    task = None
    if config.data_dir or config.name not in PUBLISHED_ROWS:
        task = load_task(config)
    source = source_folder(recipe)
    if task is not None and Path(source).is_dir() and source:
        try:
            tokenizer = load_tokenizer(source)
        except CheckpointError as error:
            logger.warning("%s; lengths are bounded by task.max_length", error)
        else:
            return _counted(task_sequences(recipe, task, tokenizer).encoded)
    return _bounded(config, task)


def _counted(examples: list[Encoded]) -> TaskTokens:
    answers = [len(example.answer) for example in examples]
    return TaskTokens(
        examples=len(examples),
        longest=max(map(len, examples)),
        labelled=sum(answers) / len(answers),
        most_labelled=max(answers),
        basis="counted in the data",
        encoded=tuple(examples),
    )


def _bounded(config: TaskConfig, task: Task | None) -> TaskTokens:
    if task is not None:
        examples, origin = len(task.train), "examples counted"
    else:
        examples = round(PUBLISHED_ROWS[config.name] * (1 - config.validation_share))
        examples = min(examples, config.max_train_examples or examples)
        origin = "the data set's published size"
    answer = {"classification": 1, "summarisation": config.max_new_tokens}.get(config.kind, config.max_length)
    return TaskTokens(
        examples=examples,
        longest=config.max_length,
        labelled=answer,
        most_labelled=answer,
        basis=f"{origin}, each at most task.max_length = {config.max_length} tokens: an upper bound",
    )
