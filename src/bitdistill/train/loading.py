"""Load and save models and tokenizers, with one clear error for whatever is wrong with them."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from .. import model as students
from ..errors import CheckpointError, SurgeryError
from ..processes import is_main_process
from .native import MODEL_TYPE, is_native, make_native, quantization_of, without_quantization


def load_model(source: str | Path, revision: str | None = None) -> PreTrainedModel:
    """A causal LM in fp32, from a local folder or the hub; students and native BitNets load ready to train.

    Raises:
        CheckpointError: nothing there, or it is damaged or incomplete.
    """
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    config = load_config(source, revision)  # refuses what it rules out before any weight is fetched
    native = is_native(config)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(source),
            revision=revision,
            **({"config": without_quantization(config)} if native else {}),
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with the name of the tensor
        )
    except Exception as error:  # a damaged config or weight file can fail in any way
        raise _refusal(source, "model", error) from error
    _check_tensors(source, model, report, native)
    return make_native(model, quantization_of(config)) if native else model


def _check_tensors(source: str | Path, model: PreTrainedModel, report: dict[str, Any], native: bool) -> None:
    """Every tensor of the model came from the checkpoint, in its shape, and is finite."""
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, there, wanted = mismatched[0]
        raise CheckpointError(
            f"{source}: {name} has shape {list(there)} where config.json asks for {list(wanted)}; the two files "
            "belong to different models. Fetch or make the checkpoint again"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        others = sorted(report["unexpected_keys"])
        also = f" and holds {others[0]}, which has no place in the model" if others else ""
        raise CheckpointError(
            f"{source}: the checkpoint lacks {missing[0]} ({len(missing)} tensors in all){also}; it is incomplete "
            "or its tensors were renamed. Fetch or make it again"
        )
    unused = sorted(report["unexpected_keys"])
    ternary = "quantised online" if native else getattr(model.config, "ternary", None)
    if unused and ternary:
        # Another layout of norms, or scales of trits, would be dropped without a word.
        raise CheckpointError(
            f"{source}: {unused[0]} has no place in the model that config.json describes (ternary = {ternary}); "
            "the two files do not belong together. Fetch or make the checkpoint again"
        )
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{source}: {name} holds NaN or infinite values; the checkpoint is damaged or its training "
                "diverged. Fetch or make it again"
            )


def load_config(source: str | Path, revision: str | None = None) -> PretrainedConfig:
    """The config of a model, for checks that need no weights.

    Raises:
        CheckpointError: nothing there, it is damaged, or it is more than a causal decoder and its head.
    """
    students.register_students()
    _check_exists(source)
    try:
        config = AutoConfig.from_pretrained(str(source), revision=revision)
    except Exception as error:  # a damaged config can fail in any way
        raise _refusal(source, "config", error) from error
    _check_decoder(source, config)
    return config


def _check_decoder(source: str | Path, config: PretrainedConfig) -> None:
    """Losses and scores take a model for a causal decoder and a head; refuse one that would be judged wrongly."""
    text = config.get_text_config()
    if text is not config:
        family = students.find_family(text.model_type)
        known = family.text_checkpoint if family else ""
        ready = f"use a text checkpoint such as {known}, or " if known else ""
        raise CheckpointError(
            f"{source}: {config.model_type} is a multimodal model around a text decoder of type {text.model_type}; "
            f"{ready}save the decoder alone first (docs/adding_a_family.md has the lines)"
        )
    if getattr(config, "final_logit_softcapping", None) is not None:
        raise CheckpointError(
            f"{source}: final_logit_softcapping = {config.final_logit_softcapping} caps the logits, which no loss or "
            "score here does; use a checkpoint without it (Gemma 3 has none)"
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise CheckpointError(
            f"{source}: use_bidirectional_attention lets tokens see those they are to predict; use a checkpoint of a "
            "causal language model"
        )


def check_family(source: str | Path, revision: str | None = None) -> None:
    """Raise unless stage 1 can convert this model; reads its config only.

    Raises:
        CheckpointError: the config does not load.
        SurgeryError: unknown family, or a student already.
    """
    convertible_family(load_config(source, revision).model_type)


def convertible_family(model_type: str) -> students.Family:
    """The family row of a full-precision ``model_type``.

    Raises:
        SurgeryError: unknown family, or a student already.
    """
    if any(model_type == family.student_type for family in students.FAMILIES):
        raise SurgeryError(f"this model is a ternary student already ({model_type}); refine its base instead")
    if model_type == MODEL_TYPE:
        raise SurgeryError(
            "this model is a BitNet, which has its sub-norms and is ternary by training, not by conversion; pre-train "
            "it (bitdistill base) or fine-tune it (bitdistill sft) as it is, or refine a model of another family"
        )
    family = students.find_family(model_type)
    if family is None:
        known = ", ".join(f.model_type for f in students.FAMILIES)
        raise SurgeryError(
            f"model family {model_type!r} is not supported; known families: {known}. "
            "A decoder family is one row in bitdistill/model/families.py (docs/adding_a_family.md)"
        )
    return family


def load_tokenizer(source: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a padding token (the end-of-text token where it has none)."""
    _check_exists(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), revision=revision)
    except Exception as error:  # a damaged tokenizer file can fail in any way
        raise _refusal(source, "tokenizer", error) from error
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"{source}: the tokenizer has no end-of-text token (eos_token)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save weights, config, tokenizer and, for a student, the code that loads it without this package.

    Only the main process writes.
    """
    if not is_main_process():
        return
    hf_logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check_exists(source: str | Path) -> None:
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{source}: no config.json there; this is not a model folder")
    elif path.is_absolute() or str(source).count("/") > 1 or str(source).startswith("."):
        raise CheckpointError(f"{source}: no such folder")


def _where(source: str | Path) -> str:
    """The source as an error names it: a name that is no folder was looked for on the hub."""
    return str(source) if Path(source).is_dir() else f"{source} (no such folder here, so taken for a hub id)"


def _refusal(source: str | Path, what: str, error: Exception) -> CheckpointError:
    """What is wrong in one line, and the remedy."""
    text = " ".join(str(error).split())
    text = text if " " in text else f"{type(error).__name__} {text}".strip()
    text = text if len(text) < 300 else f"{text[:300]} ..."
    remedy = {
        "config": "fetch or make the checkpoint again",
        "model": "fetch or make the checkpoint again",
        "tokenizer": "put the model's tokenizer.json and tokenizer_config.json into the folder",
    }
    advice = remedy[what] if Path(source).is_dir() else "check the path"
    return CheckpointError(f"{_where(source)}: the {what} does not load; {advice}. Reason: {text}")
