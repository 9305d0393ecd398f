"""Packed folder -> the core's model: config and header are checked here, contents by the core."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .. import _core
from ..errors import CheckpointError, EngineError
from ..layout import FORMAT_VERSION, later_settings
from ..packed import WEIGHTS_FILE, Entry, read_header, read_json_object, read_packed_config
from .families import FAMILIES, activation, check_settings, core_name, layer_settings

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


CacheForm = Literal["fp16", "int8", "int4", "int3", "fp32"]
QUERY_BITS = (16, 8, 4)
KV_FORMS: dict[int, CacheForm] = {16: "fp16", 8: "int8", 4: "int4", 3: "int3"}
"""Bits of keys and values that a model can ask for -> the form of the cache that holds just these."""


@dataclass(frozen=True)
class PackedModel:
    """An exported model's settings and tensors; no weight has been read yet."""

    folder: Path
    config: dict[str, Any]
    entries: dict[str, Entry]

    @classmethod
    def open(cls, folder: str | Path) -> "PackedModel":
        """Read ``config.json`` and the header.

        Raises:
            CheckpointError: missing, damaged, or of a family or version that this package does not read.
        """
        path = Path(folder)
        if not path.is_dir():
            raise CheckpointError(f"{folder}: no such folder; name an exported model (bitdistill export)")
        config = read_packed_config(path)
        if config.get("model_type") not in FAMILIES:
            raise CheckpointError(
                f"{folder}: model_type {config.get('model_type')!r} is not one of {', '.join(FAMILIES)}, the families "
                "that the engine runs; update bitdistill or export another model"
            )
        return cls(path, config, read_header(path / WEIGHTS_FILE))

    def core_config(self) -> _core.Config:
        """The decoder's settings.

        Raises:
            CheckpointError: a setting is missing, impossible, or one that the engine does not run.
        """
        try:
            return decoder_config(self.config)
        except (ValueError, TypeError, OverflowError) as error:
            raise CheckpointError(
                f"{self.folder / 'config.json'}: {error}; fetch or export the model again"
            ) from error

    @property
    def kv_form(self) -> CacheForm:
        """The form of the cache for the keys and values that the model was made for; ``core_config`` checks them."""
        bits = self.config["packed"].get("kv_bits", 16)
        return KV_FORMS.get(bits, "fp16") if type(bits) is int else "fp16"

    def core_tensors(self) -> list[_core.Tensor]:
        """Where the core finds each tensor, under the core's names."""
        return [
            _core.Tensor(
                core_name(self.config["model_type"], name), e.dtype, e.shape, e.offset, e.nbytes, e.checksum
            )
            for name, e in self.entries.items()
        ]

    def load(self, *, threads: int = 0, mmap: bool = False, screened: bool = False) -> _core.Model:
        """Weights into memory; with ``screened`` a copy of the head for ``Engine``'s screening.

        Raises:
            CheckpointError: the contents do not fit the settings, or are damaged.
            EngineError: a head that cannot be screened; a CPU without kernels, or ``BITDISTILL_ISA`` names what it
                cannot run.
        """
        head = self.entries.get("lm_head.weight") or self.entries.get("model.embed_tokens.weight")
        if screened and head is not None and head.dtype not in ("BF16", "F32"):
            raise EngineError(
                f"{self.folder}: screening spares reading most of a bf16 or f32 head, and this head is stored in int8 "
                "or int4; leave screening off, or export with a head in bf16"
            )
        config = self.core_config()
        path = self.folder / WEIGHTS_FILE
        try:
            return _core.Model(
                str(path), self.core_tensors(), config, threads=threads, mmap=mmap, screened=screened
            )
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}; fetch or export the model again") from error
        except RuntimeError as error:  # the core's only one: no kernels for this CPU; it says the remedy
            raise EngineError(str(error)) from error

    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end a text: generation_config.json's, or else config.json's."""
        path = self.folder / "generation_config.json"
        generation = read_json_object(path) if path.is_file() else {}
        found = generation.get("eos_token_id", self.config.get("eos_token_id"))
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise CheckpointError(f"{path}: eos_token_id {found!r} is not an id or a list of ids")
        return tuple(ids)


def linear_shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Rows and columns of the linears of one layer, by path inside the layer."""
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], _head_dim(config)
    query, key = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    return {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def _head_dim(config: dict[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // max(1, config["num_attention_heads"])


def decoder_config(config: dict[str, Any]) -> _core.Config:
    """The core's settings from a packed ``config.json``.

    Raises:
        ValueError, TypeError, OverflowError: with what is wrong.
    """
    packed = config["packed"]
    if packed.get("granularity") not in ("tensor", "channel", "block"):
        raise ValueError(
            f"packed.granularity = {packed.get('granularity')!r} is not one of tensor, channel, block"
        )
    if (packed["granularity"] == "block") != (packed.get("block_size") is not None):
        raise ValueError(
            f"packed.block_size = {packed.get('block_size')!r} does not go with granularity {packed['granularity']!r}"
        )
    check_settings(config)
    sizes: dict[str, Any] = {key: _size(config, key) for key in _SIZES}
    head_dim = _head_dim(config)
    if type(head_dim) is not int or not 0 < head_dim <= 1 << 16:
        raise ValueError(f"head_dim = {head_dim!r}: expected a positive size")
    return _core.Config(
        **sizes,
        head_dim=head_dim,
        max_context=_size(config, "max_position_embeddings"),
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        hidden_act=activation(config),
        **layer_settings(config, head_dim),
        **FAMILIES[config["model_type"]].scales(config),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        block_size=packed.get("block_size"),
        activation_rounding=packed.get("activation_rounding", "divide"),
        **_bitnet_v2(packed),
    )


def _bitnet_v2(packed: dict[str, Any]) -> dict[str, Any]:
    """The core's settings of BitNet v2: bits of activations, queries, keys and values, and Hadamard blocks."""
    settings: dict[str, Any] = {}
    for key, default, allowed in (
        ("activation_bits", None, (8, 4)),
        ("query_bits", 16, QUERY_BITS),
        ("kv_bits", 16, tuple(KV_FORMS)),
    ):
        settings[key] = packed.get(key, default)
        if type(settings[key]) is not int or settings[key] not in allowed:
            known = ", ".join(map(str, allowed))
            raise ValueError(f"packed.{key} = {settings[key]!r}: the engine runs {known}")
    blocks = packed.get("hadamard", {})
    if not isinstance(blocks, dict) or not all(type(block) is int and block > 0 for block in blocks.values()):
        raise ValueError(f"packed.hadamard = {blocks!r}: expected sites with the sizes of their blocks")
    if packed.get("format_version") == FORMAT_VERSION and (later := later_settings(packed)):
        raise ValueError(f"packed.{later[0]} = {packed[later[0]]!r}: format_version 1 has no such setting")
    return settings | {"hadamard": blocks}


def _size(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise ValueError(f"{key} = {value!r}: expected a positive whole number")
    return value
