"""Shapes of known models, as the core takes them: random weights of these measure what the real ones would."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..config import SHAPE
from ..config.presets import BASE_PRESETS
from ..errors import ConfigError
from ..layout import INT4_ROWS, LAYOUT, int4_shape, packed_shape, version_needed
from ..packed import CONFIG_FILE, ELEMENT_BYTES, WEIGHTS_FILE, PackedTensor, write_tensors
from .loading import decoder_config, linear_shapes

_QWEN3 = {
    "model_type": "bit_qwen3",
    "vocab_size": 151936,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}

_V2_1_3B = {key: value for key, value in BASE_PRESETS["bitnet-v2-1.3b"].items() if key in SHAPE}

SHAPES: dict[str, dict[str, Any]] = {
    "bitnet-2b4t": {key: value for key, value in BASE_PRESETS["bitnet-2b4t"].items() if key in SHAPE}
    | {"model_type": "bitnet", "rms_norm_eps": 1e-5, "hidden_act": "relu2", "rope_theta": 500000.0},
    "qwen3-0.6b": _QWEN3 | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28},
    "qwen3-1.7b": _QWEN3 | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28},
    "qwen3-4b": _QWEN3
    | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "bitnet-v2-1.3b": _V2_1_3B
    | {
        "model_type": "bit_llama",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "packed": {"activation_bits": 4, "hadamard": {"o_proj": 2048, "down_proj": 8192}},
    },
}
"""``config.json`` keys of the published models that the presets are named after, with what their ``packed`` sections
have of their own."""

HEADS = ("bf16", "int8", "int4")
"""Forms of embedding and head that can be measured."""

_PACKED = {
    "layout": LAYOUT,
    "granularity": "tensor",
    "block_size": None,
    "activation_bits": 8,
    "activation_rounding": "divide",
}


def find_shape(name: str, activation_bits: int | None = None) -> dict[str, Any]:
    """The settings of a preset, with a ``packed`` section; ``activation_bits`` in place of its own.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in SHAPES:
        raise ConfigError(f"--shape {name}: use one of {', '.join(SHAPES)}")
    packed = _PACKED | SHAPES[name].get("packed", {})
    if activation_bits is not None:
        packed["activation_bits"] = activation_bits
    return SHAPES[name] | {"packed": packed}


def ternary_weights(shape: dict[str, Any]) -> int:
    """Ternary weights of the whole model: multiply-adds of a token outside attention and head."""
    return int(shape["num_hidden_layers"]) * sum(
        rows * columns for rows, columns in linear_shapes(shape).values()
    )


def random_model(
    shape: dict[str, Any], head: str, *, threads: int = 0, seed: int = 0, screened: bool = False
) -> _core.Model:
    """A model of this shape with random weights, made in place; ``head`` is bf16, int8 or int4.

    Raises:
        ConfigError: another form of the head.
    """
    if head not in HEADS:
        raise ConfigError(f"--head {head}: use one of {', '.join(HEADS)}")
    if screened and head != "bf16":
        raise ConfigError(
            f"--screening spares reading most of a bf16 head, not of --head {head}; leave one out"
        )
    tensors = [
        _core.Tensor(name, dtype, size, 0, math.prod(size) * ELEMENT_BYTES[dtype])
        for name, dtype, size in _tensors(shape, head)
    ]
    config = decoder_config(shape)
    return _core.Model(None, tensors, config, threads=threads, seed=seed, screened=screened)


def write_random(folder: Path, shape: dict[str, Any], head: str) -> Path:
    """A packed model of this shape with random weights, without a tokenizer; what loading it costs can be measured."""
    rng = np.random.default_rng(0)

    def made(name: str, dtype: str, size: tuple[int, ...]) -> PackedTensor:
        def load() -> NDArray[Any]:
            if dtype == "U8":
                return rng.integers(0, 243 if name.endswith("_proj.weight") else 256, size, np.uint8)
            if dtype == "I8":
                return rng.integers(-127, 128, size, np.int8)
            if dtype == "BF16":  # 1/64 .. 1/32, of either sign where they are no scales
                sign = 0 if name.endswith("_scale") else 0x8000
                return rng.integers(0x3C80, 0x3D00, size, np.uint16) | (
                    rng.integers(0, 2, size, np.uint16) * sign
                )
            return np.full(size, 0.02 if name.endswith("_scale") else 1.0, np.float32)

        return PackedTensor(name, dtype, size, load)

    folder.mkdir(parents=True)
    version = version_needed(shape["packed"])
    write_tensors(folder / WEIGHTS_FILE, [made(*tensor) for tensor in _tensors(shape, head)], version)
    packed = shape["packed"] | {"format_version": version}
    (folder / CONFIG_FILE).write_text(json.dumps(shape | {"packed": packed}))
    return folder


def _tensors(shape: dict[str, Any], head: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, element type and shape of every tensor."""
    tensors: list[tuple[str, str, tuple[int, ...]]] = []

    def add(name: str, dtype: str, *size: int) -> None:
        tensors.append((name, dtype, size))

    hidden, head_dim, vocabulary = shape["hidden_size"], shape["head_dim"], shape["vocab_size"]
    for table in (
        ("model.embed_tokens",) if shape["tie_word_embeddings"] else ("model.embed_tokens", "lm_head")
    ):
        if head == "int4":
            blocks, groups, width = int4_shape(vocabulary, hidden)
            add(f"{table}.weight", "U8", blocks, groups, width)
            add(f"{table}.weight_scale", "BF16", blocks, groups, INT4_ROWS)
        else:
            add(f"{table}.weight", "I8" if head == "int8" else "BF16", vocabulary, hidden)
        if head == "int8":
            add(f"{table}.weight_scale", "F32", vocabulary, 1)
    for layer in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for path, (rows, columns) in linear_shapes(shape).items():
            add(f"{prefix}.{path}.weight", "U8", *packed_shape(rows, columns))
            add(f"{prefix}.{path}.weight_scale", "F32", 1, 1)
            if path in ("self_attn.o_proj", "mlp.down_proj"):
                add(f"{prefix}.{path}.norm.weight", "F32", columns)
        add(f"{prefix}.input_layernorm.weight", "F32", hidden)
        add(f"{prefix}.post_attention_layernorm.weight", "F32", hidden)
        if shape["model_type"] == "bit_qwen3":
            add(f"{prefix}.self_attn.q_norm.weight", "F32", head_dim)
            add(f"{prefix}.self_attn.k_norm.weight", "F32", head_dim)
    add("model.norm.weight", "F32", hidden)
    return tensors
