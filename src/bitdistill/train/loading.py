"""Load and save models and tokenizers, with one clear error for whatever is wrong with them."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from .. import model as students
from ..errors import CheckpointError


def load_model(source: str | Path, revision: str | None = None) -> PreTrainedModel:
    """A causal LM in fp32, from a local folder or the hub; students load as students.

    Raises:
        CheckpointError: nothing there, or it is damaged or incomplete.
    """
    students.register_students()
    hf_logging.disable_progress_bar()
    _check_exists(source)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(source), revision=revision, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{source}: the model does not load: {_first_line(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{source}: the checkpoint lacks {len(missing)} tensors, {missing[0]} for one; it is incomplete"
        )
    return model


def load_tokenizer(source: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a padding token (the end-of-text token where it has none)."""
    _check_exists(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{source}: the tokenizer does not load: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"{source}: the tokenizer has no end-of-text token (eos_token)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save weights, config, tokenizer and, for a student, the code that loads it without this package."""
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


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
