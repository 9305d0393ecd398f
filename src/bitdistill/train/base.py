"""A base made from scratch: tokenizer, random weights, pre-training in full precision, as a native BitNet b1.58 or as a
BitNet v2.

For machines and tests without a trained checkpoint at hand; the three stages treat a full-precision result like any
model. A native BitNet (arXiv 2504.12285) is ternary from its first step and is not converted. Neither is a BitNet v2
(arXiv 2504.18415), which is a student of the Llama family: that has its layers, and its checkpoint has a place for
blocks and bits.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BitNetConfig,
    BitNetForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    set_seed,
)

from ..config import SHAPE, BaseConfig, Recipe
from ..data.corpus import part_of, read_documents, source_digest
from ..errors import ConfigError
from ..model import HADAMARD_SITES, TernarySpec
from ..recipe import to_dict
from .loading import load_tokenizer, save_model
from .native import make_native
from .stage2_pretrain import train_on_corpus
from .step import run_step
from .surgery import refine

END_OF_TEXT = "<|endoftext|>"

CLASSES: dict[str, tuple[Any, Any]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "bitnet": (BitNetConfig, BitNetForCausalLM),
    "bitnet_v2": (LlamaConfig, LlamaForCausalLM),
}
"""``base.architecture`` -> config and model class."""


def run(recipe: Recipe, output_dir: Path) -> Path:
    """Make and pre-train the ``[base]`` of a recipe; returns its checkpoint.

    The untrained model stays in the run folder: a native BitNet, its full-precision twin and other learning rates start
    from the same weights.
    """
    config = recipe.base
    if config is None:
        raise ConfigError(
            "this recipe has no [base] section to make: add one (preset = ... gives it a shape)"
        )
    if config.continue_from:
        return train_on_corpus(recipe, config, "base", config.continue_from, output_dir)
    blank = run_step(
        recipe.run_dir / "base-blank",
        {
            "stage": "base",
            "seed": recipe.seed,
            "base": {key: value for key, value in to_dict(config).items() if key in SHAPE},
            "corpus_digest": source_digest(recipe.corpus),
        },
        lambda folder: _make_blank(recipe, config, folder),
        shared=recipe.shared_steps,
    )
    return train_on_corpus(recipe, config, "base", blank, output_dir, ternarise=_ternarise(config))


def _ternarise(config: BaseConfig) -> Callable[[PreTrainedModel], PreTrainedModel] | None:
    """What makes the untrained model ternary; None for one that stays in full precision."""
    if not config.ternary:
        return None
    if config.architecture == "bitnet":
        return make_native
    spec = TernarySpec(hadamard=dict.fromkeys(HADAMARD_SITES, config.hadamard_block))
    return lambda model: refine(model, spec, fold=False)[0]


def _make_blank(recipe: Recipe, config: BaseConfig, folder: Path) -> dict:
    """Get the tokenizer, draw the weights, save both."""
    own = config.tokenizer
    tokenizer = load_tokenizer(own) if own else train_tokenizer(recipe, config.vocab_size)
    set_seed(recipe.seed)
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _, model_class = CLASSES[config.architecture]
    model: PreTrainedModel = model_class(blank_config(config, vocab_size=len(tokenizer), **ids))
    save_model(model, tokenizer, folder)
    embedding = model.get_input_embeddings().weight.numel()
    total = sum(p.numel() for p in model.parameters())
    return {"parameters": total, "non_embedding_parameters": total - embedding}


def blank_config(config: BaseConfig, **tokens: int | None) -> PretrainedConfig:
    """The model of a ``[base]`` section; ``tokens`` are its tokenizer's size and special ids, by config key."""
    config_class, _ = CLASSES[config.architecture]
    values = {
        "vocab_size": config.vocab_size,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **tokens,
    }
    return config_class(  # type: ignore[no-any-return]
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        tie_word_embeddings=config.tie_word_embeddings,
        max_position_embeddings=config.max_position_embeddings,
        initializer_range=config.initializer_range,
        dtype=torch.float32,
        **values,
    )


def train_tokenizer(recipe: Recipe, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the base part of the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    share = recipe.corpus.pretrain_share
    texts = (
        text for identifier, text in read_documents(recipe.corpus) if part_of(identifier, share) == "base"
    )
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT, "<|pad|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token="<|pad|>")
