"""Plain task fine-tuning with cross-entropy: FP16-SFT (the teacher), FP16-CT-SFT and BitNet-SFT."""

from pathlib import Path

from ..checkpoint import checkpoint_digest
from ..config import Recipe
from ..data.prompts import PaddedBatch, PromptEncoder, TaskSequences
from ..data.tasks import Task, load_task
from ..recipe import to_dict
from .loading import load_model, load_tokenizer, save_model
from .objective import LanguageModelling
from .step import num_processes, run_step
from .trainer import fit, steps_for_epochs
from .weights import ternary_codes, write_weight_stats


def run(recipe: Recipe, source: str | Path, output_dir: Path) -> Path:
    """Fine-tune ``source`` on the task; returns the new checkpoint."""
    task = load_task(recipe.task)
    settings = {
        "stage": "sft",
        "seed": recipe.seed,
        "training": to_dict(recipe.sft),
        "task": to_dict(recipe.task),
        "task_digest": task.digest,
        "source": checkpoint_digest(source),
    }

    def work(folder: Path) -> dict:
        tokenizer = load_tokenizer(source, recipe.model.revision)
        model = load_model(source, recipe.model.revision)
        codes = ternary_codes(model)
        dataset = task_sequences(recipe, task, tokenizer)
        metrics = fit(
            LanguageModelling(model),
            dataset,
            PaddedBatch(tokenizer.pad_token_id),
            recipe.sft,
            steps=steps_for_epochs(recipe.sft, recipe.sft.epochs, len(dataset), num_processes()),
            seed=recipe.seed,
            work_dir=folder,
            tokenizer=tokenizer,
            title=f"{output_dir.parent.name}/{output_dir.name}",
            lengths=dataset.lengths,
        )
        write_weight_stats(model, folder, codes)
        save_model(model, tokenizer, folder)
        return metrics

    return run_step(output_dir, settings, work)


def task_sequences(recipe: Recipe, task: Task, tokenizer: object) -> TaskSequences:
    """The tokenised training examples of a task."""
    encoder = PromptEncoder(tokenizer, recipe.task.max_length)  # type: ignore[arg-type]
    return TaskSequences(encoder.examples(task.train, end=task.kind == "generation"))
