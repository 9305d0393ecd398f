"""Checkpoint -> packed model: the folder of docs/format.md, whole or not at all."""

import copy
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .checkpoint import RUN_FILE, read_run, write_json, write_text
from .errors import CheckpointError, ConfigError
from .forms import FORMS, Form, plain_tensor, table_tensors
from .layout import LAYOUT, pack, packed_shape, version_needed
from .model import BitLinear
from .model.quant import ternarize
from .model_card import model_card
from .packed import (
    CONFIG_FILE,
    DIGESTS_FILE,
    WEIGHTS_FILE,
    PackedTensor,
    is_packed,
    write_tensors,
)
from .train.loading import is_encoder, load_model, load_tokenizer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Ternary:
    """Codes ``[N, K]`` and scale of one linear, and how many input features share a scale (None: all)."""

    code: Tensor
    scale: Tensor
    block_size: int | None


def export(
    source: str | Path,
    output: Path,
    *,
    head: Form | None = None,
    embedding: Form | None = None,
    licence: str | None = None,
) -> dict[str, Any]:
    """Write the packed model of a ternary student (or of a Hugging Face BitNet) and return its facts.

    ``head`` and ``embedding``: bf16 unless asked otherwise; a tied model has one table, so they cannot differ there.
    ``licence`` of the base model, where the checkpoint does not say.

    Raises:
        CheckpointError: the source is no finished ternary model, or ``output`` holds something else.
        ConfigError: an unknown form, or two forms for one table.
    """
    from .engine.facts import packed_facts

    output = Path(output)
    _check_output(output)
    check_finished(source, "export")
    for option, form in (("--head", head), ("--embedding", embedding)):
        if form is not None and form not in FORMS:
            raise ConfigError(f"{option} {form}: use one of {', '.join(FORMS)}")
    model = load_model(source).eval()
    _check_ternary(source, model)
    tied = bool(model.config.tie_word_embeddings)
    if tied and head and embedding and head != embedding:
        raise ConfigError(
            f"--head {head} --embedding {embedding}: this model's head is its embedding (tied); give one form"
        )
    embedding_form: Form = embedding or (head if tied and head else "bf16")
    head_form: Form = embedding_form if tied else head or "bf16"
    tokenizer = load_tokenizer(source)
    config = _config(model)
    with _appearing_at(output) as folder:
        tensors = packed_tensors(model, head_form, embedding_form)
        write_tensors(folder / WEIGHTS_FILE, tensors, config["packed"]["format_version"])
        tokenizer.save_pretrained(folder)
        if not (folder / "tokenizer.json").is_file():
            raise CheckpointError(
                f"{source}: its tokenizer has no tokenizer.json (the tokenizers library's form), which the engine "
                "needs; convert the tokenizer with transformers' PreTrainedTokenizerFast"
            )
        model.generation_config.save_pretrained(folder)
        write_json(folder / CONFIG_FILE, config)
        write_text(folder / "README.md", model_card(source, model.config.model_type, licence))
        write_json(folder / DIGESTS_FILE, _digests(folder))
    return packed_facts(output)


# --- checks before any work ---


def _check_output(output: Path) -> None:
    """An earlier export may be replaced; anything else may not."""
    if not output.exists() or is_packed(output):
        return
    if output.is_dir() and not any(output.iterdir()):
        return
    raise CheckpointError(
        f"{output} is there already and is not an exported model. Nothing was changed. Use another name"
    )


def check_finished(source: str | Path, verb: str) -> None:
    """Raise CheckpointError for an exported model, or a step on its way; ``verb`` is what was to be done with it."""
    folder = Path(source)
    if is_packed(folder):
        raise CheckpointError(f"{source} is an exported model already; {verb} the student it came from")
    unfinished = folder.name.endswith(".partial") or (
        (folder / RUN_FILE).is_file() and read_run(folder).get("status") != "done"
    )
    if unfinished:
        raise CheckpointError(
            f"{source} is a step that has not finished; run its command again, then {verb} the finished folder"
        )


def _check_ternary(source: str | Path, model: PreTrainedModel) -> None:
    """Raise unless the engine can run this model."""
    from .engine.families import FAMILIES

    model_type, known = model.config.model_type, ", ".join(FAMILIES)
    if is_encoder(model.config):
        raise CheckpointError(
            f"{source}: the engine runs decoders, and {model_type} is an encoder. Use it with transformers "
            "(bitdistill eval, or AutoModelForSequenceClassification and trust_remote_code=True)"
        )
    if not any(ternary_of(m) is not None for m in model.modules() if isinstance(m, nn.Linear)):
        remedy = "Make a student of it first: bitdistill refine"
        if model_type == "bitnet":
            remedy = "It is the full-precision twin of a native BitNet: export that one"
        raise CheckpointError(
            f"{source} is not a ternary model (model_type {model_type!r}); export takes {known}. {remedy}"
        )
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"{source}: the engine does not run models of type {model_type!r} yet; it runs {known}. Use the student "
            "with transformers (bitdistill eval, or AutoModelForCausalLM and trust_remote_code=True)"
        )
    if any(m.spec.activation_bits == 16 for m in model.modules() if isinstance(m, BitLinear)):
        raise CheckpointError(
            f"{source}: activations of 16 bits (ternary.activation_bits) have no kernel in the engine; train the "
            "student with activation_bits = 8"
        )
    specs = {m.spec for m in model.modules() if isinstance(m, BitLinear)}
    if any(spec.activation_bits == 4 and spec.int4_sites != "all" for spec in specs):
        raise CheckpointError(
            f"{source}: its activations have bits and zeros by site (ternary.int4_sites, BitNet a4.8), for which the "
            "engine has no kernels. Use the student with transformers, or train one with another architecture"
        )
    if any(m.spec.dead_zone_bias for m in model.modules() if isinstance(m, BitLinear)):
        raise CheckpointError(
            f"{source}: its dead weights make a bias in every ternary linear (ternary.dead_zone_bias), which the "
            "engine has no place for. Use the student with transformers, or train one with refine.dead_zone_bias = 0"
        )
    for name, module in model.named_modules():
        if getattr(module, "rms_norm", None) is not None:
            raise CheckpointError(
                f"{source}: {name} has an rms_norm of its own (quantization_config.use_rms_norm), which the packed "
                "format has no place for"
            )


# --- tensors ---


@torch.no_grad()
def ternary_of(module: nn.Linear) -> Ternary | None:
    """Codes and scale of a ternary linear as its forward pass computes them; None for a plain linear."""
    weight = module.weight.detach()
    if isinstance(module, BitLinear):
        spec = module.spec
        block = spec.block_size if spec.granularity == "block" else None
        return Ternary(*module.ternarized(), block)
    if type(module).__name__ != "AutoBitLinear":
        return None
    if not module.online_quant:  # trits already, times a scale
        return Ternary(weight.float(), module.weight_scale.float().reshape(1, 1), None)
    return Ternary(*ternarize(weight, rounding="multiply"), None)


def packed_tensors(model: PreTrainedModel, head: Form, embedding: Form) -> list[PackedTensor]:
    """Every tensor of the packed model, made when it is written."""
    tensors: list[PackedTensor] = []
    done: set[str] = set()
    float_form: Form = "f32" if head == "f32" else "bf16"
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        done |= {f"{name}.weight", f"{name}.weight_scale"}
        tensors += _linear(f"{name}.weight", module, float_form)
    offset = {f"{name}.weight" for name, module in model.named_modules() if _adds_one(module)}
    for name, parameter in model.named_parameters():  # a tied head comes once, as the embedding
        if name in done:
            continue
        if name in (EMBEDDING, HEAD):
            tensors += table_tensors(name, parameter.detach(), head if name == HEAD else embedding)
        else:
            gain = parameter.detach().float() + 1 if name in offset else parameter.detach()
            tensors.append(plain_tensor(name, gain, "F32"))
    return tensors


def _adds_one(module: nn.Module) -> bool:
    """Whether a norm multiplies by ``1 + weight``, as Gemma's do: asked of the norm itself, with a weight of zero."""
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or weight is None:
        return False
    twin = copy.deepcopy(module)
    nn.init.zeros_(twin.weight)
    return bool(twin(torch.ones_like(weight)).any())


def _linear(name: str, module: nn.Linear, form: Form) -> list[PackedTensor]:
    ternary = ternary_of(module)
    if ternary is None:
        return table_tensors(name, module.weight.detach(), form)
    rows, columns = module.weight.shape
    block, scale_shape = ternary.block_size, tuple(ternary.scale.shape)

    def again() -> Ternary:
        # Made twice rather than kept: all codes of a model at once are bigger than the model.
        found = ternary_of(module)
        assert found is not None
        return found

    return [
        PackedTensor(
            name,
            "U8",
            packed_shape(rows, columns, block),
            lambda: pack(again().code.cpu().numpy().astype(np.int8), block),
        ),
        PackedTensor(f"{name}_scale", "F32", scale_shape, lambda: again().scale.cpu().numpy()),
    ]


# --- the other files ---


def _config(model: PreTrainedModel) -> dict[str, Any]:
    """The student's config, without the keys that would make transformers read the packed bytes as weights."""
    config = model.config.to_dict()
    for key in ("auto_map", "quantization_config", "dtype", "torch_dtype"):
        config.pop(key, None)
    specs = [m.spec for m in model.modules() if isinstance(m, BitLinear)]
    granularity = specs[0].granularity if specs else "tensor"
    bits = specs[0].activation_bits if specs else 8
    later: dict[str, Any] = {}
    if specs:
        states = {"query_bits": specs[0].query_bits, "kv_bits": specs[0].kv_bits}
        later = {key: value for key, value in states.items() if value != 16}
        later |= {"hadamard": dict(specs[0].hadamard)} if specs[0].hadamard else {}
    config["model_type"] = model.config.model_type
    packed = {
        "layout": LAYOUT,
        "granularity": granularity,
        "block_size": specs[0].block_size if granularity == "block" else None,
        "activation_bits": bits,
        "activation_rounding": specs[0].rounding if specs else "multiply",
        **later,
    }
    config["packed"] = {"format_version": version_needed(packed), **packed}
    return config


def _digests(folder: Path) -> dict[str, Any]:
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as stream:
            files[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"algorithm": "sha256", "files": files}


@contextmanager
def _appearing_at(output: Path) -> Iterator[Path]:
    """A temporary folder beside ``output`` that takes its name when the block succeeds, and vanishes when it fails."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        _check_output(output)  # it may have appeared meanwhile
        if is_packed(output):
            old = output.with_name(f".{output.name}.{os.getpid()}.old")
            os.rename(output, old)
            os.rename(temporary, output)
            shutil.rmtree(old)
        else:
            os.rename(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
