"""AWQ (Lin et al., arXiv 2306.00978): scales of input channels that protect the weights of large activations.

A group of linears that read the same input gets scales ``s = mean|x|^alpha`` (eq. 5): W becomes W diag(s), and 1 / s
goes into what makes that input, so that the full-precision function stays what it was. Alpha is the best of a grid by
the output error that ternary weights cause, as in the reference implementation (``llm-awq``, ``auto_scale.py``), which
also normalises the scales and looks at the whole attention or feed-forward module where the group feeds one.

Where 1 / s goes: into the gain of a linear's own SubLN; of linears without one, into the gain of the layer's norm
before them, or (output projections) into the rows of the linear that feeds them, if both are equally wide.

AWQ's second search, for a clipping threshold of the weights, is left out. It shrinks a range that the largest weight
sets; a ternary scale is a mean, beyond which every weight has the same code already, and ``scale = "learned"``
trains what is left to choose.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import SurgeryError
from ..model import BitLinear, Family, ends_in
from ..model.quant import fake_quantize_weight
from .calibration import Call, InputStatistics, output_energy, quantisers_off, recorded_calls

GRID = 20
"""Values of alpha: 0, 1/20 ... 19/20."""

SMALLEST = 1e-4
"""Floor of a channel's scale before normalisation."""

Fold = Callable[[Tensor], None]


@dataclass(frozen=True)
class Group:
    """Linears of a layer that read the same input."""

    name: str
    ternary: tuple[str, ...]
    """Paths of those whose weights are quantised; their input statistics are equal."""
    linears: tuple[nn.Linear, ...]
    """All that read the input, linears that stay full precision included."""
    inspected: nn.Module | None
    """The module whose output is compared; None: the one linear by itself."""
    fold: Fold
    """Divides what makes the input by scales ``[K]``."""


@dataclass(frozen=True)
class Scaled:
    """What was done to a layer."""

    scales: dict[str, Tensor]
    """Path of every linear whose columns were multiplied -> scales ``[K]``."""
    notes: tuple[str, ...]


def check_awq(family: Family, norm_sites: str) -> None:
    """Raise SurgeryError where linears have nothing before them that scales can be folded into."""
    if not family.input_norms and norm_sites != "all":
        raise SurgeryError(
            f"refine.initialisation = 'awq': the norms of {family.model_type} feed the residual sum as well as the "
            'linears, so scales cannot be folded into them; set refine.norm_sites = "all", which gives every '
            "linear its own, or use initialisation = 'gptq'"
        )


@torch.no_grad()
def scale_layer(
    layer: nn.Module, calls: Sequence[Call], statistics: dict[str, InputStatistics], family: Family
) -> Scaled:
    """Search the scales of every group of a layer, then multiply and fold them; the layer is changed in place.

    Args:
        calls: the layer's inputs on the calibration data.
        statistics: by path, of the inputs of its ternary linears.
    """
    groups, notes = layer_groups(layer, family)
    chosen = []
    for group in groups:
        alpha, scales, _ = search(group, layer, calls, statistics[group.ternary[0]])
        notes.append(f"{group.name}: alpha {alpha:.2f}")
        chosen.append(scales)
    for group, scales in zip(groups, chosen, strict=True):
        for linear in group.linears:
            linear.weight.mul_(scales.to(linear.weight.dtype))
        group.fold(scales)
    found = {path: scales for group, scales in zip(groups, chosen, strict=True) for path in group.ternary}
    return Scaled(found, tuple(notes))


def candidates(magnitude: Tensor) -> Iterator[tuple[float, Tensor]]:
    """Alpha and scales ``[K]`` of the grid, normalised so that the largest times the smallest is 1."""
    for index in range(GRID):
        alpha = index / GRID
        scales = magnitude.pow(alpha).clamp(min=SMALLEST)
        yield alpha, scales / (scales.max() * scales.min()).sqrt()


@torch.no_grad()
def search(
    group: Group, layer: nn.Module, calls: Sequence[Call], statistics: InputStatistics
) -> tuple[float, Tensor, list[float]]:
    """The best alpha and its scales, and the squared output errors of the whole grid.

    Activations are not quantised here: AWQ chooses by the weights.
    """
    ternary = [layer.get_submodule(path) for path in group.ternary]
    error = (
        _linear_error(ternary[0], statistics.gram)
        if group.inspected is None
        else _module_error(group.inspected, ternary, layer, calls)
    )
    grid = list(candidates(statistics.magnitude / statistics.tokens))
    errors = [error(scales) for _, scales in grid]
    best = errors.index(min(errors))
    return *grid[best], errors


def _quantised(linear: BitLinear, scales: Tensor) -> Tensor:
    """What the student multiplies by once ``scales`` are folded, for the input as it is now: ``Q(W diag(s)) / s``."""
    scales = scales.to(linear.weight.dtype)
    spec = linear.spec
    return fake_quantize_weight(linear.weight * scales, spec.granularity, spec.block_size) / scales


def _linear_error(linear: BitLinear, gram: Tensor) -> Callable[[Tensor], float]:
    return lambda scales: output_energy(_quantised(linear, scales) - linear.weight, gram)


def _module_error(
    module: nn.Module, ternary: Sequence[BitLinear], layer: nn.Module, calls: Sequence[Call]
) -> Callable[[Tensor], float]:
    inner, expected = [], []
    for call in calls:
        with quantisers_off(layer), recorded_calls([module]) as found:
            call.run(layer)
        inner.append(Call(*found[module], call.mask))
        with quantisers_off(module):
            expected.append(inner[-1].run(module))
    latents = [linear.weight.data for linear in ternary]

    def error(scales: Tensor) -> float:
        quantised = [_quantised(linear, scales) for linear in ternary]
        try:
            for linear, weight in zip(ternary, quantised, strict=True):
                linear.weight.data = weight
            with quantisers_off(module):
                differences = [c.run(module) - out for c, out in zip(inner, expected, strict=True)]
        finally:
            for linear, latent in zip(ternary, latents, strict=True):
                linear.weight.data = latent
        return sum(float(d[c.mask].double().square().sum()) for c, d in zip(inner, differences, strict=True))

    return error


# --- where scales go ---


def layer_groups(layer: nn.Module, family: Family) -> tuple[list[Group], list[str]]:
    """The groups of a layer, and a note for every ternary linear that cannot be in one."""
    linears = {path: m for path, m in layer.named_modules() if isinstance(m, nn.Linear)}
    ternary = {path: m for path, m in linears.items() if isinstance(m, BitLinear)}
    groups = [
        Group(path, (path,), (linear,), None, _into_gain(linear.norm, 0.0))
        for path, linear in ternary.items()
        if linear.norm is not None
    ]
    own = {path for group in groups for path in group.ternary}
    for norm, names in family.input_norms:
        readers = {path: m for path, m in linears.items() if ends_in(path, names) and path not in own}
        quantised = tuple(path for path in readers if path in ternary)
        if quantised:
            parent = quantised[0].rpartition(".")[0]
            fold = _into_gain(layer.get_submodule(norm), family.gain_offset)
            groups.append(
                Group(
                    ", ".join(quantised),
                    quantised,
                    tuple(readers.values()),
                    layer.get_submodule(parent),
                    fold,
                )
            )
    notes = []
    for feeder_name, name in family.feeds:
        for path in (p for p in ternary if p not in own and ends_in(p, (name,))):
            feeder_path = next(p for p in linears if ends_in(p, (feeder_name,)))
            feeder = linears[feeder_path]
            if feeder.out_features == ternary[path].in_features:
                groups.append(Group(path, (path,), (ternary[path],), None, _into_rows(feeder)))
            else:
                notes.append(
                    f"{path}: not scaled, {feeder_name} has {feeder.out_features} outputs for its "
                    f"{ternary[path].in_features} inputs (grouped-query attention)"
                )
    return groups, notes


def _into_gain(norm: nn.Module, offset: float) -> Fold:
    def fold(scales: Tensor) -> None:
        gain = (norm.weight.double() + offset) / scales.double()
        norm.weight.copy_(gain - offset)

    return fold


def _into_rows(linear: nn.Linear) -> Fold:
    def fold(scales: Tensor) -> None:
        scales = scales.to(linear.weight.dtype)
        linear.weight.div_(scales[:, None])
        if linear.bias is not None:
            linear.bias.div_(scales)

    return fold
