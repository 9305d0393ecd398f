"""What an exported model is: bytes per part, bits per weight (``bitdistill inspect``)."""

import math
from pathlib import Path
from typing import Any

from .loading import PackedModel, linear_shapes

_TABLES = ("model.embed_tokens.weight", "lm_head.weight")
_PARTS = ("ternary", "scales", "dense", "embedding", "head", "norms")


def packed_facts(folder: str | Path) -> dict[str, Any]:
    """Family, layout, parameters, bytes of every part, bits per weight; reads config and header only.

    Raises:
        CheckpointError: it is not an exported model, or damaged.
    """
    model = PackedModel.open(folder)
    parts = dict.fromkeys(_PARTS, 0)
    shapes = linear_shapes(model.config)
    ternary_weights = other = 0
    for name, entry in model.entries.items():
        parts[_part(name, entry.dtype)] += entry.nbytes
        if name in _TABLES:
            other += model.config["vocab_size"] * model.config["hidden_size"]
        elif entry.dtype == "U8":
            ternary_weights += math.prod(shapes.get(".".join(name.split(".")[3:5]), (0,)))  # without padding
        elif not name.endswith("_scale"):
            other += math.prod(entry.shape)
    ternary_bytes = parts["ternary"] + sum(
        e.nbytes
        for n, e in model.entries.items()
        if _part(n, e.dtype) == "scales" and model.entries.get(n.removesuffix("_scale"), e).dtype == "U8"
    )
    total = sum(parts.values())
    return {
        "model_type": model.config["model_type"],
        **{key: model.config["packed"][key] for key in ("format_version", "layout", "granularity")},
        "parameters": ternary_weights + other,
        "ternary_parameters": ternary_weights,
        "bytes": total,
        "bytes_by_part": parts,
        "bits_per_ternary_weight": round(8 * ternary_bytes / ternary_weights, 4) if ternary_weights else None,
        "bits_per_weight": round(8 * total / max(1, ternary_weights + other), 4),
        "bytes_at_16_bit": 2 * (ternary_weights + other),
    }


def _part(name: str, dtype: str) -> str:
    if name.startswith("model.embed_tokens."):
        return "embedding"
    if name.startswith("lm_head."):
        return "head"
    if dtype == "U8":
        return "ternary"
    if name.endswith("_scale"):
        return "scales"
    return "dense" if name.endswith("_proj.weight") else "norms"
