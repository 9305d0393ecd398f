"""What sets the families that the engine runs apart from one another, read from ``config.json``."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from .rope import rope_frequencies

Activation = Literal["silu", "relu2", "gelu_tanh"]
ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "relu2": "relu2", "gelu_pytorch_tanh": "gelu_tanh"}
"""Hugging Face's names -> the core's."""


def _positive(config: dict[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{key} = {value!r}: expected a positive number")
    return float(value)


@dataclass(frozen=True, kw_only=True)
class EngineFamily:
    """One row: a decoder with the linears of Llama, and what else it has."""

    renamed: dict[str, str] = field(default_factory=dict)
    """Path inside a layer, as in the file -> as the core calls it."""
    activation_key: str = "hidden_act"
    scales: Callable[[dict[str, Any]], dict[str, Any]] = lambda _: {}
    """``attention_scale`` (of the products of queries and keys), ``embedding_scale``, where they are not neutral."""
    must_be_unset: tuple[str, ...] = ()
    """Settings that change the forward pass in a way that the engine does not know."""


FAMILIES: dict[str, EngineFamily] = {
    "bit_llama": EngineFamily(),
    "bit_mistral": EngineFamily(),
    "bit_qwen2": EngineFamily(),
    "bit_qwen3": EngineFamily(),
    "bit_smollm3": EngineFamily(),
    "bit_gemma3_text": EngineFamily(
        renamed={
            "post_attention_layernorm": "self_attn.output_norm",
            "pre_feedforward_layernorm": "post_attention_layernorm",
            "post_feedforward_layernorm": "mlp.output_norm",
        },
        activation_key="hidden_activation",
        scales=lambda config: {
            "attention_scale": _positive(config, "query_pre_attn_scalar", 256) ** -0.5,
            "embedding_scale": config["hidden_size"] ** 0.5,
        },
        must_be_unset=("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"),
    ),
    "bitnet": EngineFamily(
        renamed={
            "self_attn.attn_sub_norm": "self_attn.o_proj.norm",
            "mlp.ffn_sub_norm": "mlp.down_proj.norm",
        }
    ),
}
"""By ``model_type``."""


def core_name(model_type: str, name: str) -> str:
    """The core's name of a tensor of the file."""
    prefix, _, rest = name.partition("model.layers.")
    if prefix or not rest:
        return name
    layer, _, path = rest.partition(".")
    module, _, leaf = path.rpartition(".")
    return f"model.layers.{layer}.{FAMILIES[model_type].renamed.get(module, module)}.{leaf}"


def layer_settings(config: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """The core's ``ropes``, ``layer_ropes`` and ``layer_windows``.

    Raises:
        ValueError: settings that the engine does not run, or that make no sense.
    """
    count = config["num_hidden_layers"]
    types = config.get("layer_types")
    if types is None:  # Mistral's window is every layer's; other families that have one say which layers
        every = config["model_type"] == "bit_mistral" and config.get("sliding_window") is not None
        types = ["sliding_attention" if every else "full_attention"] * count
    if not isinstance(types, list) or len(types) != count:
        raise ValueError(f"layer_types = {types!r}: expected a list of num_hidden_layers = {count} names")
    if unknown := set(types) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types: {sorted(map(str, unknown))[0]!r} is not what the engine runs")
    window = config.get("sliding_window")
    if "sliding_attention" in types and (type(window) is not int or window < 1):
        raise ValueError(f"sliding_window = {window!r}: expected a positive whole number")
    ropes, rope_of = _ropes(config, types, head_dim)
    with_rope = config.get("no_rope_layers")  # 1 where a layer has positions, 0 where not
    if with_rope is not None and (not isinstance(with_rope, list) or len(with_rope) < count):
        raise ValueError(f"no_rope_layers = {with_rope!r}: expected num_hidden_layers = {count} values")
    return {
        "ropes": ropes,
        "layer_ropes": [
            rope_of[t] if with_rope is None or with_rope[i] else None for i, t in enumerate(types)
        ],
        "layer_windows": [window if t == "sliding_attention" else 0 for t in types],
    }


def _ropes(
    config: dict[str, Any], types: list[str], head_dim: int
) -> tuple[list[tuple[list[float], float]], dict[str, int]]:
    """RoPE settings are one for the model, or one for each type of layer."""
    found = config.get("rope_parameters")
    if isinstance(found, dict) and found and all(isinstance(value, dict) for value in found.values()):
        kinds = sorted(set(types))
        if missing := [kind for kind in kinds if kind not in found]:
            raise ValueError(f"rope_parameters has nothing for {missing[0]}")
        each = [rope_frequencies(config | {"rope_parameters": found[kind]}, head_dim) for kind in kinds]
        return each, {kind: i for i, kind in enumerate(kinds)}
    return [rope_frequencies(config, head_dim)], dict.fromkeys(types, 0)


def activation(config: dict[str, Any]) -> Activation:
    """The core's name of the gate's activation.

    Raises:
        ValueError: one that the engine does not have.
    """
    key = FAMILIES[config["model_type"]].activation_key
    name = config.get(key, "silu")
    if name not in ACTIVATIONS:
        raise ValueError(f"{key} = {name!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def check_settings(config: dict[str, Any]) -> None:
    """Refuse what the engine would pass over.

    Raises:
        ValueError: with the setting.
    """
    for key in FAMILIES[config["model_type"]].must_be_unset:
        if config.get(key):
            raise ValueError(f"{key} = {config[key]!r} is not what the engine runs")
