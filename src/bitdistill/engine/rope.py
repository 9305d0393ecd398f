"""RoPE frequencies from ``config.json``: Hugging Face's names and formulas, in fp32 as there.

inv_freq[i] = theta ** (-2 i / head_dim), then scaled by rope_type; cos and sin are multiplied by the factor
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """The settings in their present form; configs from before transformers 5 spread them over two keys."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise ValueError(f"rope_parameters = {found!r} is not a JSON object")
    rope = dict(found)
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return rope


def rope_frequencies(config: dict[str, Any], head_dim: int) -> tuple[list[float], float]:
    """``head_dim / 2`` frequencies, and the factor of cos and sin.

    Raises:
        ValueError: a RoPE variant that the engine does not know, or settings that make no sense.
    """
    rope = rope_parameters(config)
    kind = rope["rope_type"]
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type {kind!r} is not one of {', '.join(ROPE_TYPES)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor = {rope['partial_rotary_factor']}: the engine rotates whole heads"
        )
    theta = _positive(rope, "rope_theta")
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelengths = np.power(np.float32(theta), exponents)
    inv_freq = (np.float32(1) / wavelengths).astype(np.float32)
    scale = 1.0
    if kind == "linear":
        inv_freq = inv_freq / np.float32(_positive(rope, "factor"))
    elif kind == "llama3":
        inv_freq = _llama3(rope, inv_freq)
    elif kind == "yarn":
        inv_freq, scale = _yarn(rope, wavelengths, head_dim, theta, config)
    return [float(f) for f in inv_freq], scale


def _positive(rope: dict[str, Any], key: str) -> float:
    value = rope.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"rope_parameters.{key} = {value!r}: expected a positive number")
    return float(value)


def _llama3(rope: dict[str, Any], inv_freq: NDArray[np.float32]) -> NDArray[np.float32]:
    factor, context = _positive(rope, "factor"), _positive(rope, "original_max_position_embeddings")
    low, high = _positive(rope, "low_freq_factor"), _positive(rope, "high_freq_factor")
    if low >= high:
        raise ValueError(f"rope_parameters.low_freq_factor = {low} is not below high_freq_factor = {high}")
    wavelength = np.float32(2 * math.pi) / inv_freq
    smooth = ((np.float32(context) / wavelength) - np.float32(low)) / np.float32(high - low)
    between = (1 - smooth) * inv_freq / np.float32(factor) + smooth * inv_freq
    scaled = np.where(wavelength > context / low, inv_freq / np.float32(factor), between)
    return np.where(wavelength < context / high, inv_freq, scaled).astype(np.float32)


def _yarn(
    rope: dict[str, Any],
    wavelengths: NDArray[np.float32],
    dim: int,
    theta: float,
    config: dict[str, Any],
) -> tuple[NDArray[np.float32], float]:
    context = _positive(rope, "original_max_position_embeddings")
    if rope.get("factor") is None:
        rope = rope | {"factor": config.get("max_position_embeddings", 0) / context}
    factor = _positive(rope, "factor")

    def mscale(weight: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    scale = rope.get("attention_factor")
    if scale is None:
        both = rope.get("mscale") and rope.get("mscale_all_dim")
        scale = mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"]) if both else mscale()

    def correction(rotations: float) -> float:
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = correction(rope.get("beta_fast") or 32), correction(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as Hugging Face: a ramp needs a width
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    kept = np.float32(1) - ramp
    mixed = (1 / (np.float32(factor) * wavelengths)) * (1 - kept) + (1 / wavelengths) * kept
    return mixed.astype(np.float32), float(scale)
