"""Plain task fine-tuning with cross-entropy: FP16-SFT (the teacher), FP16-CT-SFT and BitNet-SFT."""

from pathlib import Path
from typing import Any

from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from ..checkpoint import checkpoint_digest
from ..config import DistillConfig, Recipe, SftConfig
from ..data.prompts import PaddedBatch, PromptEncoder, TaskSequences
from ..data.segments import SegmentSequences
from ..data.tasks import Task, load_task
from ..data.teacher_rows import TaughtBatch, TaughtSequences
from ..recipe import to_dict
from .encoder import check_recipe, load_classifier
from .encoder_objective import Classification
from .loading import is_encoder, load_config, load_model, load_tokenizer, save_model
from .objective import LanguageModelling, Objective
from .step import run_step
from .trainer import fit, processes_to_keep, steps_for_epochs, training_settings
from .weights import ternary_codes, write_weight_stats


def run(recipe: Recipe, source: str | Path, output_dir: Path) -> Path:
    """Fine-tune ``source`` on the task; returns the new checkpoint."""
    task = load_task(recipe.task)
    processes = processes_to_keep(recipe, output_dir)
    settings = {
        "stage": "sft",
        "seed": recipe.seed,
        "training": training_settings(recipe.sft, processes),
        "task": task_settings(recipe),
        "task_digest": task.digest,
        "source": checkpoint_digest(source, recipe.revision_of(source)),
    }

    def work(folder: Path) -> dict[str, Any]:
        revision = recipe.revision_of(source)
        config = load_config(source, revision)
        check_recipe(recipe, config, distill=False)
        tokenizer = load_tokenizer(source, revision)
        objective: Objective
        if is_encoder(config):
            objective = Classification(load_classifier(source, revision, task, recipe.seed))
        else:
            objective = LanguageModelling(load_model(source, revision))
        return train_on_task(
            recipe, recipe.sft, task, objective, tokenizer, folder, step_title(output_dir), processes
        )

    return run_step(output_dir, settings, work, shared=recipe.shared_steps)


def train_on_task(
    recipe: Recipe,
    config: SftConfig | DistillConfig,
    task: Task,
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    title: str,
    processes: int,
    *,
    taught: TaughtSequences | None = None,
) -> dict[str, Any]:
    """Train an objective's student on the task's training examples and save it; returns the metrics.

    ``taught`` are the same examples with what a cached teacher said of them.
    """
    codes = ternary_codes(objective.student)
    dataset: TaskSequences | SegmentSequences | TaughtSequences
    collate: PaddedBatch | DataCollatorWithPadding | TaughtBatch
    if is_encoder(objective.student.config):
        dataset = SegmentSequences(task.train, tokenizer, recipe.task.max_length)
        collate = DataCollatorWithPadding(tokenizer)
    elif taught is not None:
        dataset, collate = taught, TaughtBatch(tokenizer.pad_token_id)
    else:
        dataset, collate = task_sequences(recipe, task, tokenizer), PaddedBatch(tokenizer.pad_token_id)
    metrics = fit(
        objective,
        dataset,
        collate,
        config,
        steps=steps_for_epochs(config, config.epochs, len(dataset), processes),
        seed=recipe.seed,
        work_dir=folder,
        tokenizer=tokenizer,
        title=title,
        processes=processes,
        lengths=dataset.lengths,
    )
    save_model(objective.student, tokenizer, folder)
    write_weight_stats(objective.student, folder, codes)
    return metrics


def task_sequences(recipe: Recipe, task: Task, tokenizer: PreTrainedTokenizerBase) -> TaskSequences:
    """The task's training examples as every fine-tune sees them."""
    encoder = PromptEncoder(tokenizer, recipe.task.max_length)
    longest = recipe.task.max_new_tokens if task.kind == "summarisation" else 0
    return TaskSequences(encoder.examples(task.train, end=task.kind != "classification", longest=longest))


def task_settings(recipe: Recipe) -> dict[str, Any]:
    """What a fine-tune depends on: not how answers are scored; what only selects data shows in the task's digest."""
    elsewhere = ("scoring", "document_column", "columns", "max_validation_examples")
    return {key: value for key, value in to_dict(recipe.task).items() if key not in elsewhere}


def step_title(output_dir: Path) -> str:
    """What the progress bar calls a fine-tune: the method, and the learning rate where there is a grid."""
    return f"{output_dir.parent.name}/{output_dir.name}"
