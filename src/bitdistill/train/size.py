"""How big a model is when it is stored: the numbers behind every "bytes" in a table."""

from dataclasses import dataclass

from torch import nn

from ..model import BitLinear
from ..model.quant import scale_shape

TERNARY_BITS = 1.6
"""Bits per ternary weight in the packed format: five trits to a byte."""


@dataclass(frozen=True)
class ModelSize:
    """Parameters and stored bytes; embeddings and head are included."""

    parameters: int
    ternary_parameters: int
    bytes: int


def model_size(model: nn.Module) -> ModelSize:
    """Size with ternary matrices at 1.6 bits a weight, their scales in fp32, everything else in 16 bits.

    Shared (tied) tensors count once. Scales are parameters only where they are learned.
    """
    layers = [m for m in model.modules() if isinstance(m, BitLinear)]
    ternary = {id(m.weight): m for m in layers}
    scales = {id(m.weight_scale) for m in layers if m.weight_scale is not None}
    parameters = ternary_parameters = 0
    size = 0.0
    for parameter in model.parameters():
        parameters += parameter.numel()
        if id(parameter) in scales:
            continue
        layer = ternary.get(id(parameter))
        if layer is None:
            size += 2 * parameter.numel()
            continue
        ternary_parameters += parameter.numel()
        size += parameter.numel() * TERNARY_BITS / 8 + 4 * _num_scales(layer)
        if layer.spec.dead_zone_bias and layer.bias is None:
            size += 2 * layer.out_features  # folded into a bias of its own
    return ModelSize(parameters, ternary_parameters, round(size))


def _num_scales(layer: BitLinear) -> int:
    shape = scale_shape(layer.out_features, layer.in_features, layer.spec.granularity, layer.spec.block_size)
    return shape[0] * shape[1]
