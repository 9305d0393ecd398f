"""Encoders in the stages: their classifiers, and the settings that a kind of model follows.

A classifier is the encoder with Hugging Face's head, a pooler and a linear, in full precision. Where a checkpoint's
classes are the task's, its head is kept. Otherwise the linear is drawn from the seed, and so is the pooler where the
checkpoint has none; the draw does not depend on the encoder, so every method of a run starts with the same head.
"""

from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from ..config import Recipe
from ..config.checks import check, check_unused
from ..data.tasks import Task
from ..errors import CheckpointError
from .loading import check_tensors, is_classifier, is_encoder, load_as, load_config, load_model


def load_classifier(source: str | Path, revision: str | None, task: Task, seed: int) -> PreTrainedModel:
    """Any checkpoint of an encoder, as a classifier of the task; in fp32.

    Raises:
        CheckpointError: it does not load, or holds no whole encoder.
    """
    config = load_config(source, revision)
    if is_classifier(config) and _classes(config) == list(task.classes):
        return load_model(source, revision)
    names = dict(enumerate(task.classes))
    model, report = load_as(
        AutoModelForSequenceClassification,
        source,
        revision,
        problem_type="single_label_classification",
        num_labels=len(names),
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    encoder = f"{model.base_model_prefix}."
    linear = sorted(name for name, _ in model.named_parameters() if not name.startswith(encoder))
    pooler = sorted(name for name in report["missing_keys"] if name.startswith(f"{encoder}pooler."))
    _draw(model, [*linear, *pooler], seed)
    check_tensors(
        source,
        model,
        {
            "mismatched_keys": [k for k in report["mismatched_keys"] if k[0].startswith(encoder)],
            "missing_keys": [k for k in report["missing_keys"] if k.startswith(encoder) and k not in pooler],
            "unexpected_keys": [k for k in report["unexpected_keys"] if k.startswith(encoder)],
        },
    )
    vars(model.config).pop("auto_map", None)  # a masked LM's would be saved with the classifier's
    return model


@torch.no_grad()
def _draw(model: PreTrainedModel, names: list[str], seed: int) -> None:
    """Draw matrices as the family does, and zero biases."""
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        parameter = model.get_parameter(name)
        if parameter.dim() > 1:
            parameter.normal_(std=model.config.initializer_range, generator=generator)
        else:
            parameter.zero_()


def load_finished_classifier(source: str | Path, revision: str | None, task: Task) -> PreTrainedModel:
    """A classifier that has been trained for the task's classes: a teacher, or a model to judge.

    Raises:
        CheckpointError: it is none, or its classes are others or in another order.
    """
    check_finished_classifier(source, load_config(source, revision), task)
    return load_model(source, revision)


def check_finished_classifier(source: str | Path, config: PretrainedConfig, task: Task) -> None:
    """Raise unless a checkpoint is a classifier of the task's classes."""
    if not is_encoder(config) or not is_classifier(config):
        kind = "an encoder without a classification head" if is_encoder(config) else "a decoder"
        raise CheckpointError(
            f"{source}: {config.model_type} here is {kind}, where a classifier is needed; fine-tune an encoder on the "
            "task first (bitdistill sft or distill)"
        )
    found, wanted = _classes(config), list(task.classes)
    # Other names may be the same classes: many checkpoints say LABEL_0. The same names must be in the same order.
    if len(found) != len(wanted) or (found != wanted and sorted(found) == sorted(wanted)):
        raise CheckpointError(
            f"{source}: its classes are {', '.join(found)} and the task's are {', '.join(wanted)}, in that order; use "
            "a model fine-tuned on this task, or order task.labels as it does"
        )


def _classes(config: PretrainedConfig) -> list[str]:
    return [str(config.id2label[index]) for index in range(config.num_labels)]


def check_recipe(recipe: Recipe, config: PretrainedConfig, *, distill: bool) -> None:
    """Refuse what this kind of model cannot do with the task, and settings that it would ignore.

    Args:
        config: of the model that reads the task.
        distill: whether the ``[distill]`` section is used.

    Raises:
        ConfigError: with the key, its value and the remedy.
    """
    task, family = recipe.task, config.model_type
    if not is_encoder(config):
        remedy = f"{family} is a decoder, which reads a prompt; write task.template"
        check_unused(task, "task", ("columns",), remedy)
        return
    remedy = f"{family} is an encoder, which classifies; use a decoder for free text"
    check(task.kind == "classification", "task.kind", task.kind, remedy)
    check_unused(task, "task", ("scoring",), f"{family} is an encoder, which writes no text; leave it out")
    remedy = f"{family} is an encoder, which has no prompt; leave it out"
    if task.name == "jsonl":
        remedy = f"{family} is an encoder, which reads columns as they are; name them in task.columns"
    check_unused(task, "task", ("template",), remedy)
    check_positions(config, "task.max_length", task.max_length)
    if distill:
        values = recipe.distill
        remedy = f"{family} is an encoder: its logits are of classes, not of tokens; leave it out"
        check_unused(values, "distill", ("kd_tokens",), f'{remedy}, or set it to "response" behind a preset')
        remedy = f"{family} is an encoder, whose teacher is not cached; leave it out"
        check_unused(values, "distill", ("teacher_cache",), remedy)
        remedy = f"{family} has no rotary embedding; leave it out"
        check_unused(values, "distill", ("relation_states",), remedy)
        remedy = f'{family} is an encoder, whose tokens see all others; use "padding"'
        check(values.relation_mask != "causal", "distill.relation_mask", values.relation_mask, remedy)


def check_stage_2(recipe: Recipe, source: str | Path, config: PretrainedConfig) -> None:
    """Refuse an encoder that masked language modelling cannot train.

    Raises:
        CheckpointError: it is a classifier.
        ConfigError: its table of positions is shorter than the sequences, or a teacher is asked for.
    """
    if is_encoder(config):
        remedy = f"{config.model_type} is an encoder, whose stage 2 has no teacher; leave it out"
        check_unused(recipe.pretrain, "pretrain", ("lambda_logits",), remedy)
    if is_encoder(config) and is_classifier(config):
        raise CheckpointError(
            f"{source}: a classifier has no masked-LM head, which stage 2 trains; start from the checkpoint it was "
            "fine-tuned from, or leave stage 2 out"
        )
    check_positions(config, "corpus.sequence_length", recipe.corpus.sequence_length)


def check_positions(config: PretrainedConfig, key: str, tokens: int) -> None:
    """Refuse sequences that are longer than an encoder's table of positions."""
    if is_encoder(config):
        most = config.max_position_embeddings
        check(tokens <= most, key, tokens, f"the model has {most} positions; set it to {most} or less")
