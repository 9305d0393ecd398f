"""What every training step has in common, and the base made from scratch."""

from dataclasses import dataclass
from typing import Literal

from .checks import LARGEST_SIZE, check, check_unused


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What every training step has in common."""

    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    batch_size: int = 32
    """Sequences per micro-batch and process."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step. A step that goes on with other processes keeps its global batch, the product of
    the two and the processes that it began with."""
    gradient_checkpointing: bool = False
    """Keep the input of each layer alone and compute the layer again in the backward pass: less memory, same result."""
    schedule: Literal["cosine", "linear", "two_stage", "two_stage_cosine", "constant"] = "cosine"
    """``two_stage``: linear decay, its line multiplied by ``two_stage_drop`` from the middle on (b1.58 training tips);
    ``two_stage_cosine``: a cosine, left in the middle for one from ``two_stage_drop`` of the peak (2B4T)."""
    two_stage_drop: float = 0.5
    """The lower peak of a two-stage schedule as a share of the higher."""
    warmup_ratio: float = 0.05
    """Share of the steps with linear warm-up."""
    weight_decay: float = 0.01
    """Decoupled weight decay on matrices; norms and biases have none."""
    weight_decay_schedule: Literal["constant", "half_then_zero", "cosine_then_zero"] = "constant"
    """``half_then_zero`` switches weight decay off in the second half (b1.58 training tips); ``cosine_then_zero`` lets
    it fall along a cosine before (2B4T)."""
    max_grad_norm: float = 1.0
    """Gradient clipping by global norm; 0 disables it."""
    adam_beta2: float = 0.95
    """Second moment decay of AdamW (the first is 0.9)."""
    quant_warmup_ratio: float = 0.0
    """Share of the steps in which quantisation is mixed in, lambda rising from 0 to 1; ternary models only."""
    quant_warmup_form: Literal["mix", "soft"] = "mix"
    """``mix``: weights between latents and codes; ``soft``: mean codes of a softmax that grows sharper (Hestia)."""
    freeze_codes_ratio: float = 0.0
    """Share of the steps, the last ones, in which ternary weights keep their codes and scales while norms, embeddings,
    head and biases learn on; ternary models only."""
    freeze_codes_lr: float = 1.0
    """Factor on the learning rate in those steps."""
    int4_activations_ratio: float = 0.0
    """Share of the steps, the last ones, in which activations have 4 bits, which the student then keeps (BitNet v2:
    0.05); ternary models only."""
    ema_decay: float = 0.0
    """Decay per step of a moving average of the weights, which takes their place at the end; 0 keeps none."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute precision; latents stay fp32. ``auto`` is bf16 where the device has it in hardware."""
    save_every: int = 200
    """Optimizer steps between checkpoints: the most that a kill can lose."""
    log_every: int = 10
    """Optimizer steps between lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        section = type(self).__name__.removesuffix("Config").lower()
        check(
            self.learning_rate > 0,
            f"{section}.learning_rate",
            self.learning_rate,
            "use a positive number",
        )
        for key in ("batch_size", "gradient_accumulation_steps", "save_every", "log_every"):
            check(getattr(self, key) >= 1, f"{section}.{key}", getattr(self, key), "use a whole number >= 1")
        for key in ("warmup_ratio", "quant_warmup_ratio", "int4_activations_ratio"):
            check(
                0 <= getattr(self, key) <= 1,
                f"{section}.{key}",
                getattr(self, key),
                "use a share in [0, 1]",
            )
        if not self.quant_warmup_ratio:
            check_unused(self, section, ("quant_warmup_form",), "set quant_warmup_ratio")
        self._check_tail(section)
        for key in ("weight_decay", "max_grad_norm"):
            check(getattr(self, key) >= 0, f"{section}.{key}", getattr(self, key), "use 0 or more")
        check(
            0 < self.two_stage_drop <= 1,
            f"{section}.two_stage_drop",
            self.two_stage_drop,
            "use (0, 1]",
        )
        check(0 < self.adam_beta2 < 1, f"{section}.adam_beta2", self.adam_beta2, "use (0, 1)")
        if not self.schedule.startswith("two_stage"):
            check_unused(self, section, ("two_stage_drop",), 'set schedule = "two_stage"')
        else:
            check(
                self.warmup_ratio < 0.5,
                f"{section}.warmup_ratio",
                self.warmup_ratio,
                "the learning rate drops in the middle of the run; use less than 0.5",
            )
        check(
            self.schedule != "two_stage_cosine" or self.two_stage_drop < 0.5,
            f"{section}.two_stage_drop",
            self.two_stage_drop,
            "the first cosine is at half of its peak in the middle; use less than 0.5, so that there is a drop",
        )

        check(0 <= self.ema_decay < 1, f"{section}.ema_decay", self.ema_decay, "use a decay in [0, 1)")
        check(
            not (self.ema_decay and self.freeze_codes_ratio),
            f"{section}.ema_decay",
            self.ema_decay,
            "averaged weights have other codes than those that freeze_codes_ratio keeps; leave one of the two out",
        )

    def _check_tail(self, section: str) -> None:
        frozen, rate = self.freeze_codes_ratio, self.freeze_codes_lr
        check(0 <= frozen < 1, f"{section}.freeze_codes_ratio", frozen, "use a share in [0, 1)")
        check(rate > 0, f"{section}.freeze_codes_lr", rate, "use a positive number")
        if not frozen:
            check_unused(self, section, ("freeze_codes_lr",), "set freeze_codes_ratio")
        check(
            self.quant_warmup_ratio + frozen <= 1,
            f"{section}.freeze_codes_ratio",
            frozen,
            f"quant_warmup_ratio = {self.quant_warmup_ratio} leaves fewer steps to the codes; lower one of the two",
        )


@dataclass(frozen=True, kw_only=True)
class CorpusTrainingConfig(TrainingConfig):
    """Language modelling on the corpus: stage 2 and the base."""

    tokens: int = 1_000_000
    """Training budget in tokens; the corpus is repeated if it holds fewer."""
    eval_every: int = 0
    """Optimizer steps between held-out losses in metrics.jsonl (the last step has one too); 0 computes none."""
    eval_sequences: int = 128
    """Held-out sequences of such a loss, spread evenly over the held-out part."""

    def __post_init__(self) -> None:
        super().__post_init__()
        section = type(self).__name__.removesuffix("Config").lower()
        check(self.tokens >= 1, f"{section}.tokens", self.tokens, "give a positive training budget in tokens")
        check(self.eval_every >= 0, f"{section}.eval_every", self.eval_every, "use 0 or more")
        check(self.eval_sequences >= 1, f"{section}.eval_sequences", self.eval_sequences, "use at least 1")
        if not self.eval_every:
            check_unused(self, section, ("eval_sequences",), "set eval_every")


BITNETS = ("bitnet", "bitnet_v2", "bitnet_a4_8")
"""Architectures of a base that is ternary from its first step."""

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
"""Sizes of a decoder beside its vocabulary, as ``config.json`` calls them."""

SHAPE = ("architecture", "tokenizer", "vocab_size", *SIZES, "tie_word_embeddings", "initializer_range")
"""Keys of ``[base]`` that decide the untrained model."""


@dataclass(frozen=True, kw_only=True)
class BaseConfig(CorpusTrainingConfig):
    """A base made from scratch: full precision, where no trained one can be had, or a native BitNet b1.58."""

    architecture: Literal["qwen3", "llama", "bitnet", "bitnet_v2", "bitnet_a4_8"] = "qwen3"
    """``bitnet``: SubLN, squared ReLU and no biases, as BitNet b1.58 2B4T (Hugging Face's ``BitNetForCausalLM``);
    ``bitnet_v2``: a Llama's student with SubLN and a Hadamard transform before o_proj and down_proj; ``bitnet_a4_8``:
    one with SubLN and squared ReLU, whose 4-bit activations are BitNet a4.8's hybrid: 4 bits before q, k, v, gate and
    up, 8 bits before o_proj, of the larger half alone, and before down_proj."""
    ternary: bool | None = None
    """Train with ternary linears, which the two BitNets are built for and do unless this is false: false makes the
    full-precision twin, with the same initial weights and the same order of tokens."""
    hadamard_block: int = 0
    """Features that ``bitnet_v2`` transforms together, a power of two; 0 takes the largest that divides each input."""
    continue_from: str = ""
    """Checkpoint of an earlier base to go on from, on the same part of the corpus; empty starts from random weights."""
    tokens: int = 10_000_000
    """Training budget in tokens; the corpus is repeated if it holds fewer."""
    tokenizer: str = ""
    """Folder or hub id of the tokenizer; empty trains one on the base part of the corpus."""
    vocab_size: int = 8192
    """Entries of the byte-level BPE tokenizer trained on the corpus."""
    hidden_size: int = 256
    """Width of the residual stream."""
    intermediate_size: int = 512
    """Width of the gated feed-forward layer."""
    num_hidden_layers: int = 8
    """Decoder layers."""
    num_attention_heads: int = 8
    """Query heads."""
    num_key_value_heads: int = 4
    """Key and value heads (grouped-query attention)."""
    head_dim: int = 32
    """Width of one head; heads x head_dim need not equal hidden_size, but for ``bitnet``."""
    max_position_embeddings: int = 2048
    """Longest sequence, in tokens."""
    tie_word_embeddings: bool = True
    """Share the embedding with the output head."""
    initializer_range: float = 0.02
    """Standard deviation of the random weights; narrow models start faster with about hidden_size^-0.5."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ternary is None and not self.continue_from:
            object.__setattr__(
                self, "ternary", self.architecture in BITNETS
            )  # what is recorded is what was run
        check(
            not self.ternary or self.architecture in BITNETS,
            "base.ternary",
            self.ternary,
            'only architecture = "bitnet", "bitnet_v2" and "bitnet_a4_8" have the norms for it; another base turns '
            "ternary by bitdistill refine",
        )
        check(
            self.vocab_size >= 260,
            "base.vocab_size",
            self.vocab_size,
            "use at least 260 (256 bytes and the special tokens)",
        )
        check(
            self.initializer_range > 0,
            "base.initializer_range",
            self.initializer_range,
            "use a positive number",
        )
        for key in ("vocab_size", *SIZES):
            size = getattr(self, key)
            check(
                1 <= size < LARGEST_SIZE,
                f"base.{key}",
                size,
                f"use a whole number from 1 to {LARGEST_SIZE - 1}",
            )
        if self.continue_from:
            remedy = "the checkpoint of base.continue_from has its own; leave it out"
            check_unused(self, "base", ("ternary", "hadamard_block", *SHAPE), remedy)
        elif self.tokenizer:
            check_unused(self, "base", ("vocab_size",), "the tokenizer of base.tokenizer has its own")
        check(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "base.num_key_value_heads",
            self.num_key_value_heads,
            f"it must divide num_attention_heads = {self.num_attention_heads}",
        )
        check(
            self.architecture != "bitnet" or self.num_attention_heads * self.head_dim == self.hidden_size,
            "base.head_dim",
            self.head_dim,
            f'architecture = "bitnet" needs num_attention_heads x head_dim = hidden_size ({self.num_attention_heads} x '
            f"{self.head_dim} is not {self.hidden_size})",
        )
        self._check_v2()

    def _check_v2(self) -> None:
        ratio, block = self.int4_activations_ratio, self.hadamard_block
        check(
            not ratio or self.architecture in ("bitnet_v2", "bitnet_a4_8") or bool(self.continue_from),
            "base.int4_activations_ratio",
            ratio,
            f'architecture = "{self.architecture}" has no place for 4-bit activations; use "bitnet_v2" or '
            '"bitnet_a4_8"',
        )
        if self.architecture != "bitnet_v2" or not (self.ternary or self.continue_from):
            remedy = 'set architecture = "bitnet_v2", which the full-precision twin has no transform of'
            check_unused(self, "base", ("hadamard_block",), remedy)
        remedy = "use a power of two, or 0 for the largest that divides each input"
        check(block >= 0 and not block & (block - 1), "base.hadamard_block", block, remedy)
        widths = {
            "num_attention_heads x head_dim": self.num_attention_heads * self.head_dim,
            "intermediate_size": self.intermediate_size,
        }
        for name, width in widths.items():
            remedy = (
                f"it does not divide {name} = {width}; use {width & -width} or a smaller power of two, or 0"
            )
            check(not block or width % block == 0, "base.hadamard_block", block, remedy)
