"""Load and save models and tokenizers, with one clear error for whatever is wrong with them."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from .. import model as students
from ..config import LARGEST_SIZE, SIZES
from ..errors import CheckpointError, SurgeryError
from ..processes import is_main_process
from .native import MODEL_TYPE, is_native, make_native, quantization_of, without_quantization
from .sharding import is_sharded, whole_state


def load_model(source: str | Path, revision: str | None = None) -> PreTrainedModel:
    """A causal LM in fp32, from a local folder or the hub; students and native BitNets load ready to train.

    An encoder comes as the classifier that it is, or else as a masked LM.

    Raises:
        CheckpointError: nothing there, or it is damaged or incomplete.
    """
    config = load_config(source, revision)  # refuses what it rules out before any weight is fetched
    if is_native(config):
        latents = {"config": without_quantization(config)}
        model, report = load_as(AutoModelForCausalLM, source, revision, **latents)
        check_tensors(source, model, report, native=True)
        return make_native(model, quantization_of(config))
    if not is_encoder(config):
        model, report = load_as(AutoModelForCausalLM, source, revision)
    elif is_classifier(config):
        model, report = load_as(AutoModelForSequenceClassification, source, revision)
    else:
        model, report = load_as(AutoModelForMaskedLM, source, revision)
        if any(".pooler." in name for name in report["unexpected_keys"]):
            keep_pooler(model, load_as(AutoModelForSequenceClassification, source, revision)[0])
            report["unexpected_keys"] = [k for k in report["unexpected_keys"] if ".pooler." not in k]
    check_tensors(source, model, report)
    return model


def load_as(
    auto_class: Any, source: str | Path, revision: str | None, **config: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model of one kind in fp32, and transformers' report of the tensors that it missed or did not expect.

    Args:
        config: settings that replace the checkpoint's, or its whole ``config``.

    Raises:
        CheckpointError: it does not load.
    """
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        return auto_class.from_pretrained(  # type: ignore[no-any-return]
            str(source),
            revision=revision,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, with the name of the tensor
            **config,
        )
    except Exception as error:  # a damaged config or weight file can fail in any way
        raise _refusal(source, "model", error) from error


def keep_pooler(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Give a masked LM the pooler that ``other`` has: it does not use one, the classifier made of it later does.

    Hugging Face's masked-LM class leaves it out, which would cost the methods with a stage 2, and only them, a
    trained part of the checkpoint. It is frozen: no loss of a masked LM reaches it.
    """
    pooler = getattr(other.base_model, "pooler", None)
    if pooler is not None and getattr(model.base_model, "pooler", pooler) is None:
        model.base_model.pooler = deepcopy(pooler).requires_grad_(False)


def check_tensors(
    source: str | Path, model: PreTrainedModel, report: dict[str, Any], *, native: bool = False
) -> None:
    """Every tensor of the model came from the checkpoint, in its shape, and is finite."""
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, there, wanted = mismatched[0]
        raise CheckpointError(
            f"{source}: {name} has shape {list(there)} where config.json asks for {list(wanted)}; the two files "
            "belong to different models. Fetch or make the checkpoint again"
        )
    missing = sorted(report["missing_keys"])
    encoder = f"{model.base_model_prefix}."
    if missing and is_encoder(model.config) and not any(name.startswith(encoder) for name in missing):
        raise CheckpointError(
            f"{source}: the checkpoint holds an encoder alone, without the head of {type(model).__name__} "
            f"({missing[0]}); use one that was saved with its masked-LM head"
        )
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
        CheckpointError: nothing there, it is damaged, or it is neither a causal decoder with its head nor an encoder.
    """
    students.register_students()
    _check_exists(source)
    try:
        config = AutoConfig.from_pretrained(str(source), revision=revision)
    except Exception as error:  # a damaged config can fail in any way
        raise _refusal(source, "config", error) from error
    _check_sizes(source, config.get_text_config())
    if is_encoder(config):
        _check_encoder(source, config)
    else:
        _check_decoder(source, config)
    return config


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether a config is of an encoder of the table, full precision or a student."""
    family = students.family_of(config.model_type)
    return family is not None and family.is_encoder


def is_classifier(config: PretrainedConfig) -> bool:
    """Whether a checkpoint was saved as a sequence classifier."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def _check_encoder(source: str | Path, config: PretrainedConfig) -> None:
    """Refuse an encoder's config that asks for another model."""
    if config.is_decoder:
        raise CheckpointError(
            f"{source}: is_decoder = true makes this {config.model_type} a causal decoder; use a bidirectional one"
        )
    position = getattr(config, "position_embedding_type", "absolute")
    if position != "absolute":
        raise CheckpointError(
            f"{source}: position_embedding_type = {position!r}, which transformers no longer computes; use a "
            "checkpoint with absolute positions"
        )


def _check_sizes(source: str | Path, config: PretrainedConfig) -> None:
    """Sizes that no model has would end in an allocation or a division far from their cause."""
    for key in ("vocab_size", *SIZES):
        value = getattr(config, key, None)
        if value is not None and (type(value) is not int or not 1 <= value < LARGEST_SIZE):
            raise CheckpointError(
                f"{source}: {key} = {value!r} in config.json: a model has a whole number from 1 to {LARGEST_SIZE - 1} "
                "there; fetch or make the checkpoint again"
            )
    heads, shared = (getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads"))
    if heads and shared and heads % shared:
        raise CheckpointError(
            f"{source}: num_key_value_heads = {shared} in config.json does not divide num_attention_heads = {heads}; "
            "fetch or make the checkpoint again"
        )
    if heads and not getattr(config, "head_dim", None) and config.hidden_size % heads:
        raise CheckpointError(
            f"{source}: num_attention_heads = {heads} in config.json does not divide hidden_size = "
            f"{config.hidden_size}, and there is no head_dim; fetch or make the checkpoint again"
        )


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
    """The tokenizer of a model, with a padding token (the end-of-text token where it has none).

    Raises:
        CheckpointError: it does not load, or lacks a token that the model needs.
    """
    _check_exists(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), revision=revision)
    except Exception as error:  # a damaged tokenizer file can fail in any way
        raise _refusal(source, "tokenizer", error) from error
    tokenizer.padding_side = "right"
    if is_encoder(load_config(source, revision)):
        _check_frame(source, tokenizer)
        return tokenizer
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"{source}: the tokenizer has no end-of-text token (eos_token)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_frame(source: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """An encoder's tokenizer has its special tokens and puts ``[CLS] ... [SEP]`` around a text."""
    names = ("cls_token", "sep_token", "mask_token", "pad_token")
    missing = [name for name in names if getattr(tokenizer, name) is None]
    ids = tokenizer("a")["input_ids"]
    if missing or [ids[0], ids[-1]] != [tokenizer.cls_token_id, tokenizer.sep_token_id]:
        what = f"has no {', '.join(missing)}" if missing else "does not put [CLS] and [SEP] around a text"
        raise CheckpointError(
            f"{source}: the tokenizer {what}, which an encoder needs; fetch the model's own"
        )


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save weights, config, tokenizer and, for a student, the code that loads it without this package.

    Only the main process writes. A sharded model is gathered first, for which every process must call.
    """
    state = None
    if is_sharded(model):
        state = whole_state(model)
        for name in model.all_tied_weights_keys:
            state.pop(name, None)
    if not is_main_process():
        return
    hf_logging.disable_progress_bar()
    model.save_pretrained(folder, state_dict=state)
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
