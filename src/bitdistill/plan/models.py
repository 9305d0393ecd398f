"""The models of a recipe on the meta device: the real classes, with shapes and without weights."""

import functools
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..checkpoint import RUN_FILE
from ..config import Recipe
from ..errors import ConfigError, SurgeryError
from ..model import TernarySpec
from ..train.base import blank_config
from ..train.loading import load_config
from ..train.surgery import SurgeryReport, refine
from ..train.taps import attention_layers
from .tracing import META


@dataclass(frozen=True)
class Blueprint:
    """A model, by what it is made from; hashable."""

    config: str
    """``config.json`` of the full-precision model, as text."""
    spec: TernarySpec | None = None
    """What stage 1 makes of it; None leaves it in full precision."""


def source_folder(recipe: Recipe) -> str:
    """What names the full-precision model of a recipe; empty while its ``[base]`` has yet to be made.

    Raises:
        ConfigError: the recipe names none.
    """
    if recipe.base is not None:
        folder = recipe.run_dir / "base"
        return str(folder) if (folder / RUN_FILE).is_file() else recipe.base.continue_from
    if not recipe.model.source:
        raise ConfigError("model.source is empty: name the model to convert, or add a [base] section")
    return recipe.model.source


def source_config(recipe: Recipe) -> PretrainedConfig:
    """The config of the full-precision model that a recipe starts from.

    Raises:
        CheckpointError: it does not load, or its sizes are impossible.
        ConfigError: the recipe names none.
    """
    source = source_folder(recipe)
    if source:
        return load_config(source, recipe.revision_of(source))
    assert recipe.base is not None
    return blank_config(recipe.base)


def config_text(config: PretrainedConfig) -> str:
    """A config as a `Blueprint` holds it."""
    return json.dumps(config.to_dict(), sort_keys=True, default=str)


def make(blueprint: Blueprint) -> PreTrainedModel:
    """A fresh model on the meta device."""
    return _built(blueprint)[0]


@functools.lru_cache(maxsize=32)
def surgery_report(blueprint: Blueprint) -> SurgeryReport | None:
    """What stage 1 does to the model; None in full precision."""
    return _built(blueprint)[1]


def _built(blueprint: Blueprint) -> tuple[PreTrainedModel, SurgeryReport | None]:
    values = json.loads(blueprint.config)
    with torch.device(META):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**values), dtype=torch.float32, attn_implementation="sdpa"
        )
        return (model, None) if blueprint.spec is None else refine(model, blueprint.spec)


@dataclass(frozen=True)
class Geometry:
    """What the count of operations needs of a model."""

    linear: int
    """Weights of the decoder's linears: multiply-adds of a token outside attention and head."""
    attention: int
    """Query heads x head width, summed over the layers."""
    head: int
    """Weights of the output head, tied or not."""
    states: tuple[int, ...]
    """Widths of Q, K and V together, of every attention layer."""


@functools.lru_cache(maxsize=32)
def geometry(blueprint: Blueprint) -> Geometry:
    """The geometry of a model.

    Raises:
        SurgeryError: its attention layers have no separate projections.
    """
    model = make(blueprint)
    layers: list[Any] = attention_layers(model)
    if not layers:
        raise SurgeryError(
            f"{type(model).__name__} has no attention layer with a q_proj: nothing to plan with"
        )
    linears = [m for m in model.base_model.modules() if isinstance(m, nn.Linear)]
    return Geometry(
        linear=sum(m.weight.numel() for m in linears),
        attention=sum(layer.q_proj.out_features for layer in layers),
        head=model.get_output_embeddings().weight.numel(),
        states=tuple(
            sum(getattr(layer, name).out_features for name in ("q_proj", "k_proj", "v_proj"))
            for layer in layers
        ),
    )
