"""Forms of what is not ternary in the packed model: floats, int8 by row, int4 by group (docs/format.md).

int8   w ~= code * scale[row],             code in -127..127
int4   w ~= code * scale[row, group],      code in -8..7, 64 features a group, scale in bf16
"""

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from .layout import INT4_GROUP, INT4_ROWS, int4_shape, pack_int4, pack_int4_scales
from .packed import PackedTensor

Form = Literal["bf16", "int8", "int4", "f32"]
FORMS: tuple[Form, ...] = ("bf16", "int8", "int4", "f32")

_STEPS = tuple(step / 20 for step in range(13, 22))
"""Scales tried for an int4 group, in units of max|w| / 7: below 1 the largest weights are clipped."""
_ROWS = 4096
"""Rows of an int4 table that are searched together."""


def table_tensors(name: str, weight: Tensor, form: Form) -> list[PackedTensor]:
    """The tensors of a table ``[V, D]`` in one form; made when they are written."""
    rows, columns = weight.shape
    if form == "int8":
        return [
            PackedTensor(name, "I8", (rows, columns), lambda: int8_rows(weight)[0]),
            PackedTensor(f"{name}_scale", "F32", (rows, 1), lambda: int8_rows(weight)[1]),
        ]
    if form == "int4":
        blocks, groups, width = int4_shape(rows, columns)
        shape = (blocks, groups, INT4_ROWS)
        return [
            PackedTensor(name, "U8", (blocks, groups, width), lambda: pack_int4(int4_groups(weight)[0])),
            PackedTensor(f"{name}_scale", "BF16", shape, lambda: pack_int4_scales(int4_groups(weight)[1])),
        ]
    return [plain_tensor(name, weight, "F32" if form == "f32" else "BF16")]


def plain_tensor(name: str, value: Tensor, dtype: str) -> PackedTensor:
    """A tensor of floats, ``BF16`` or ``F32``."""

    def load() -> NDArray[Any]:
        if dtype == "BF16":
            return np.asarray(value.to(torch.bfloat16).view(torch.uint16).cpu().numpy())
        return np.asarray(value.float().cpu().numpy())

    return PackedTensor(name, dtype, tuple(value.shape), load)


def int8_rows(weight: Tensor) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Absmax INT8 codes per row, and their scales ``[V, 1]``; a row of zeros gets scale 1."""
    peak = weight.float().abs().amax(dim=1, keepdim=True)
    scale = torch.where(peak > 0, peak / 127, torch.ones_like(peak))
    code = (weight.float() / scale).round().clamp(-127, 127)
    return code.to(torch.int8).cpu().numpy(), scale.cpu().numpy()


def int4_groups(weight: Tensor) -> tuple[NDArray[np.int8], NDArray[np.uint16]]:
    """INT4 codes ``[V, D]`` and bf16 scales ``[V, groups]`` (as uint16), of least squared error among those tried.

    Codes are made with the scale as it is stored. A group of zeros gets scale 1.
    """
    parts = [_int4_groups(part) for part in weight.detach().float().cpu().split(_ROWS)]
    code, scale = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return code[:, : weight.shape[1]].numpy(), scale.view(torch.uint16).numpy()


def _int4_groups(rows: Tensor) -> tuple[Tensor, Tensor]:
    padded = F.pad(rows, (0, -rows.shape[1] % INT4_GROUP))
    groups = padded.unflatten(1, (-1, INT4_GROUP))
    peak = groups.abs().amax(dim=2, keepdim=True)
    best_code, best_scale = torch.zeros_like(groups), torch.ones_like(peak)
    least = torch.full_like(peak, torch.inf)
    for step in _STEPS:
        scale = (peak * (step / 7)).bfloat16().float()
        scale = torch.where(scale > 0, scale, 1.0)
        code = (groups / scale).round().clamp(-8, 7)
        error = (code * scale - groups).square().sum(dim=2, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best_code = torch.where(better, code, best_code)
        best_scale = torch.where(better, scale, best_scale)
    return best_code.flatten(1).to(torch.int8), best_scale.squeeze(2).bfloat16()
