"""Where the latents of a student start, and what ternary weights cost the output of every linear there."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import RefineConfig
from ..errors import SurgeryError
from ..model import BitLinear, Family, family_of
from ..model.quant import expand_scale
from .awq import check_awq, scale_layer
from .calibration import Batch, Call, InputStatistics, input_statistics, layers_in_turn, output_energy
from .gptq import gptq, with_absmean


@dataclass(frozen=True)
class Findings:
    """What calibration found out."""

    initialisation: str
    errors: dict[str, tuple[float, float]]
    """Path of a ternary linear -> ``||(W_q - W) X|| / ||W X||`` of absmean and of the chosen initialisation, X being
    the linear's inputs behind its norm on the calibration text."""
    notes: tuple[str, ...]

    @property
    def means(self) -> tuple[float, float]:
        """Both errors, averaged over the linears."""
        before, after = zip(*self.errors.values(), strict=True)
        return sum(before) / len(before), sum(after) / len(after)


def check_initialisation(model_type: str, config: RefineConfig) -> None:
    """Refuse what cannot be done to a family, before any weight is read.

    Raises:
        SurgeryError: with the key and the remedy.
    """
    family = family_of(model_type)
    if family is not None and config.initialisation == "awq":
        check_awq(family, config.norm_sites)


@torch.no_grad()
def initialise(student: PreTrainedModel, calibration: Sequence[Batch], config: RefineConfig) -> Findings:
    """Give the latents (and learned scales) of a fresh student their start; it is changed in place.

    Args:
        calibration: batches of the stage-2 text.
        config: ``gptq`` shows a layer what the quantised layers before it make of the text, as its reference
            implementation does; ``awq`` and the errors of ``absmean`` take full-precision inputs.

    Raises:
        SurgeryError: there is no text, or GPTQ cannot invert a Hessian.
    """
    if not calibration:
        raise SurgeryError("no calibration batch was given for refine.initialisation; give text")
    family = family_of(student.config.model_type)
    assert family is not None
    errors: dict[str, tuple[float, float]] = {}
    notes: list[str] = []
    quantised = config.initialisation == "gptq"
    for path, layer, calls in layers_in_turn(student, calibration, quantised=quantised):
        statistics = input_statistics(layer, calls)
        linears = {name: layer.get_submodule(name) for name in statistics}
        before = {name: _error(linear, statistics[name]) for name, linear in linears.items()}
        if config.initialisation == "gptq":
            after = {
                name: _start_from_gptq(linear, statistics[name], config, f"{path}.{name}")
                for name, linear in linears.items()
            }
        elif config.initialisation == "awq":
            after = _start_from_awq(layer, calls, statistics, family, path, notes)
        else:
            after = before
        errors |= {f"{path}.{name}": (before[name], after[name]) for name in linears}
    return Findings(config.initialisation, errors, tuple(notes))


def _error(linear: BitLinear, statistics: InputStatistics) -> float:
    """Relative output error of a linear's codes against its latents."""
    return _relative(linear, linear.weight, statistics)


def _relative(linear: BitLinear, weight: Tensor, statistics: InputStatistics) -> float:
    code, scale = linear.ternarized()
    quantised = code * expand_scale(scale, linear.in_features, linear.spec.block_size)
    energy = output_energy(weight, statistics.gram)
    return (output_energy(quantised - weight, statistics.gram) / energy) ** 0.5 if energy > 0 else 0.0


def _start_from_gptq(
    linear: BitLinear, statistics: InputStatistics, config: RefineConfig, path: str
) -> float:
    weight = linear.weight.clone()
    damping, act_order = config.gptq_damping, config.gptq_act_order
    try:
        latent, codes, scale = gptq(
            weight, statistics.gram, linear.spec, damping=damping, act_order=act_order
        )
    except torch.linalg.LinAlgError as error:
        raise SurgeryError(
            f"refine.gptq_damping = {damping}: the Hessian of {path} ({statistics.tokens} tokens for "
            f"{linear.in_features} inputs) cannot be inverted; raise it, or refine.calibration_sequences"
        ) from error
    if linear.weight_scale is not None:
        linear.weight.copy_(latent)
        linear.weight_scale.copy_(scale)
    else:
        linear.weight.copy_(with_absmean(latent, codes, scale, linear.spec))
    return _relative(linear, weight, statistics)


def _start_from_awq(
    layer: nn.Module,
    calls: Sequence[Call],
    statistics: dict[str, InputStatistics],
    family: Family,
    path: str,
    notes: list[str],
) -> dict[str, float]:
    """Scale a layer; the errors are those of its linears as they are then, on the inputs that they get then."""
    scaled = scale_layer(layer, calls, statistics, family)
    notes += [f"{path}.{note}" for note in scaled.notes]
    after = {}
    for name, inputs in statistics.items():
        linear = layer.get_submodule(name)
        if linear.weight_scale is not None:
            linear.weight_scale.copy_(linear.absmean())
        after[name] = _error(linear, inputs.scaled(scaled.scales[name]) if name in scaled.scales else inputs)
    return after
