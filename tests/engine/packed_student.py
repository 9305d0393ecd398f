"""A torch student as the engine core takes it: a safetensors file, its tensors, the decoder's settings.

Written with numpy and the safetensors package alone, and independent of the exporter, so that it can test both.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import nn

from bitdistill import _core, layout
from bitdistill.model.layers import BitLinear
from bitdistill.model.quant import ternarize

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SUB_NORMS = {"attn_sub_norm": "o_proj.norm", "ffn_sub_norm": "down_proj.norm"}
DTYPES = {"uint8": "U8", "int8": "I8", "uint16": "BF16", "float32": "F32"}


def as_bf16(x: torch.Tensor) -> np.ndarray:
    return x.to(torch.bfloat16).view(torch.uint16).numpy()


def int8_rows(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    scale = x.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127  # a padding row is all zeros
    return (x / scale).round().to(torch.int8).numpy(), scale.float().numpy()


def int4_groups(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Codes of a plain absmax, and bf16 scales; layout.pack_int4 makes bytes of the codes."""
    padded = torch.nn.functional.pad(x.detach(), (0, -x.shape[1] % layout.INT4_GROUP))
    groups = padded.unflatten(1, (-1, layout.INT4_GROUP))
    scale = (groups.abs().amax(dim=2, keepdim=True).clamp(min=1e-30) / 7).bfloat16()
    code = (groups / scale.float()).round().clamp(-8, 7).flatten(1)[:, : x.shape[1]]
    return code.to(torch.int8).numpy(), as_bf16(scale[:, :, 0])


def widened(scale: np.ndarray) -> np.ndarray:
    return (scale.astype(np.uint32) << 16).view(np.float32)


def int4_values(code: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The weights that int4 codes and bf16 scales stand for."""
    return code * widened(scale).repeat(layout.INT4_GROUP, axis=1)[:, : code.shape[1]]


def ternary_of(module: nn.Module) -> tuple[np.ndarray, np.ndarray, int | None] | None:
    """Codes, scale and block size of a ternary linear of this package or of transformers; None for a plain linear."""
    weight = module.weight.detach()
    if isinstance(module, BitLinear):
        spec = module.spec
        code, scale = ternarize(weight, spec.granularity, spec.block_size)
        block = spec.block_size if spec.granularity == "block" else None
        return code.numpy().astype(np.int8), scale.numpy(), block
    if type(module).__name__ == "AutoBitLinear":
        code, scale = ternarize(weight)
        return code.numpy().astype(np.int8), scale.numpy(), None
    return None


def tensors_of(model: Any, table: str = "F32", dense: str = "F32") -> dict[str, np.ndarray]:
    """Every tensor of the packed model. ``table``: dtype of embedding and head; ``dense``: of skipped linears."""
    tensors: dict[str, np.ndarray] = {}
    covered = set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        covered.add(f"{name}.weight")
        ternary = ternary_of(module)
        if ternary is None:
            weight = module.weight.detach()
            tensors[f"{name}.weight"] = weight.numpy() if dense == "F32" else as_bf16(weight)
        else:
            code, scale, block = ternary
            tensors[f"{name}.weight"] = layout.pack(code, block)
            tensors[f"{name}.weight_scale"] = scale
    for name, parameter in model.named_parameters():
        if name in covered:
            continue
        value = parameter.detach()
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            if table == "I8":
                tensors[name], tensors[f"{name}_scale"] = int8_rows(value)
            elif table == "I4":
                code, scale = int4_groups(value)
                tensors[name] = layout.pack_int4(code)
                tensors[f"{name}_scale"] = layout.pack_int4_scales(scale)
            else:
                tensors[name] = value.numpy() if table == "F32" else as_bf16(value)
            continue
        layer, _, leaf = name.rpartition(".")
        parent, _, last = layer.rpartition(".")
        tensors[f"{parent}.{SUB_NORMS.get(last, last)}.{leaf}"] = value.numpy()
    return tensors


def entries_of(path: Path, checksums: bool = True) -> list[_core.Tensor]:
    """The tensors of a safetensors file, as its header places them."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    entries = []
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        start = 8 + length + begin
        dtype = "BF16" if entry["dtype"] == "U16" else entry["dtype"]
        checksum = layout.checksum(data[start : start + end - begin]) if checksums else None
        entries.append(_core.Tensor(name, dtype, entry["shape"], start, end - begin, checksum))
    return entries


def config_of(model: Any, **changes: Any) -> _core.Config:
    """The decoder's settings of a torch model; RoPE frequencies are the ones it runs with."""
    c = model.config
    blocks = [
        m.spec.block_size
        for m in model.modules()
        if isinstance(m, BitLinear) and m.spec.granularity == "block"
    ]
    is_bitnet = c.model_type == "bitnet"
    specs = [m.spec for m in model.modules() if isinstance(m, BitLinear)]
    fields = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
        "max_context": c.max_position_embeddings,
        "rms_norm_eps": c.rms_norm_eps,
        "hidden_act": c.hidden_act,
        "ropes": [(model.model.rotary_emb.inv_freq.tolist(), model.model.rotary_emb.attention_scaling)],
        "tie_word_embeddings": c.tie_word_embeddings,
        "block_size": blocks[0] if blocks else None,
        "activation_rounding": "multiply" if is_bitnet else "divide",
        "activation_bits": specs[0].activation_bits if specs else 8,
        "hadamard": dict(specs[0].hadamard) if specs else {},
    }
    return _core.Config(**fields | changes)


def write(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    # The package cannot name bf16 in numpy: its bits go as uint16, and entries_of calls them BF16.
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)
    return path


def core_model(
    model: Any,
    folder: Path,
    *,
    table: str = "F32",
    dense: str = "F32",
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> _core.Model:
    """The torch model in the engine core; ``settings`` of the decoder in place of the model's own."""
    path = write(folder / "model.safetensors", tensors_of(model, table, dense))
    config = config_of(model, **(settings or {}))
    return _core.Model(str(path), entries_of(path), config, **({"threads": 1} | options))
