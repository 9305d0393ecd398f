"""Stage 3, distillation-based fine-tuning (BitDistill, eq. 8-13): the task, with a fine-tuned teacher beside it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..checkpoint import checkpoint_digest
from ..config import DistillConfig, Recipe
from ..data.tasks import load_task
from ..errors import ConfigError, TrainingError
from .encoder import check_recipe, load_classifier, load_finished_classifier
from .encoder_objective import ClassDistillation
from .loading import is_encoder, load_config, load_model, load_tokenizer
from .losses import relation_kd
from .objective import Distillation, layer_pairs
from .sft import step_title, task_sequences, task_settings, train_on_task
from .step import run_step
from .teacher import CachedTeacher, check_same_tokenizer
from .teacher_cache import cached_teacher
from .trainer import processes_to_keep, training_settings


def run(recipe: Recipe, source: str | Path, output_dir: Path) -> Path:
    """Distill ``recipe.distill.teacher`` into ``source`` on the task; returns the new checkpoint.

    Raises:
        TrainingError: the teacher does not fit; see ``check_teacher``.
    """
    config = recipe.distill
    if not config.teacher:
        raise ConfigError(
            "distill.teacher is empty: name the fine-tuned full-precision teacher (bitdistill sft makes one)"
        )
    task = load_task(recipe.task)
    processes = processes_to_keep(recipe, output_dir)
    settings = {
        "stage": "stage3_distill",
        "seed": recipe.seed,
        "training": _settings(config, processes)
        | {"teacher": checkpoint_digest(config.teacher, config.teacher_revision)},
        "task": task_settings(recipe),
        "task_digest": task.digest,
        "source": checkpoint_digest(source, recipe.revision_of(source)),
    }

    def work(folder: Path) -> dict[str, Any]:
        model_config = load_config(source, recipe.revision_of(source))
        check_recipe(recipe, model_config, distill=True)
        tokenizer = load_tokenizer(source, recipe.revision_of(source))
        check_teacher(recipe, source)
        revision = recipe.revision_of(source)
        taught = None
        teacher: PreTrainedModel | CachedTeacher
        if is_encoder(model_config):
            teacher = load_finished_classifier(config.teacher, config.teacher_revision, task)
            student = load_classifier(source, revision, task, recipe.seed)
            objective: Distillation = ClassDistillation(student, teacher, config)
        else:
            if config.teacher_cache == "none":
                teacher = load_model(config.teacher, config.teacher_revision)
            else:
                sequences = task_sequences(recipe, task, tokenizer)
                teacher, taught = cached_teacher(recipe, source, tokenizer, sequences)
            objective = Distillation(load_model(source, revision), teacher, config)
        title = step_title(output_dir)
        return train_on_task(
            recipe, config, task, objective, tokenizer, folder, title, processes, taught=taught
        )

    return run_step(output_dir, settings, work, shared=recipe.shared_steps)


def _settings(config: DistillConfig, processes: int) -> dict[str, Any]:
    """The section as the step's record holds it: what its values started from and where a cache lies decide nothing,
    nor do the cache's keys without one."""
    settings = training_settings(config, processes)
    del settings["teacher_cache_dir"], settings["preset"], settings["teacher_method"]
    if config.teacher_cache != "topk":
        del settings["cache_top_k"]
    if config.teacher_cache == "none":
        del settings["teacher_cache"]
    return settings


def check_teacher(recipe: Recipe, source: str | Path) -> None:
    """Refuse a teacher that the student of ``source`` cannot be held against; reads configs and tokenizers only.

    Width, depth and heads may be others, as long as the relation KD can pair the layers and split the states.

    Raises:
        TrainingError: the tokenizers differ, a layer of the relation KD does not exist, or its heads do not pair.
    """
    config, revision = recipe.distill, recipe.revision_of(source)
    teacher = config.teacher, config.teacher_revision
    check_same_tokenizer(load_tokenizer(source, revision), load_tokenizer(*teacher))
    models = load_config(source, revision), load_config(*teacher)
    if not layer_pairs(config, *(model.num_hidden_layers for model in models)):
        return
    try:  # the loss itself knows what fits: one token of each model goes through it
        relation_kd(*map(_states, models), heads=config.relation_heads, form=config.relation_form)
    except ValueError as error:
        raise TrainingError(str(error)) from error


def _states(config: PretrainedConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K, V of one token in the shapes that a model's attention has, ``[1, heads, 1, head width]``."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    query = torch.zeros(1, heads, 1, width)
    shared = torch.zeros(1, getattr(config, "num_key_value_heads", None) or heads, 1, width)
    return query, shared, shared
