"""The three stages and the plain fine-tune beside them."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from .checks import check, check_unused
from .training import CorpusTrainingConfig, TrainingConfig


@dataclass(frozen=True, kw_only=True)
class RefineConfig:
    """Stage 1: which linears turn ternary and where SubLN goes."""

    norm_sites: Literal["none", "subln", "all"] = "subln"
    """``subln``: before o_proj and down_proj (the paper); ``all``: before every linear (the authors' code)."""
    gain: Literal["one", "rms"] = "one"
    """Start of the norm gain: 1, or the RMS of the norm's input measured on a few batches."""
    granularity: Literal["tensor", "channel", "block"] = "tensor"
    """Weights that share one scale."""
    block_size: int = 128
    """Input features per scale when granularity is ``block``."""
    activation_bits: Literal[4, 8, 16] = 8
    """Activation precision of ternary linears; 16 leaves activations alone."""
    scale: Literal["absmean", "learned"] = "absmean"
    """Scale of ternary weights: computed from the latents, or a parameter that starts there and is trained (LSQ)."""
    initialisation: Literal["absmean", "gptq", "awq"] = "absmean"
    """Where the latents start: at the model's weights, at GPTQ's, or at the weights with AWQ's scales of channels."""
    gptq_damping: float = 0.01
    """Added to the diagonal of GPTQ's Hessian, as a share of its mean."""
    gptq_act_order: bool = False
    """Let GPTQ take the columns with the largest inputs first, not from left to right."""
    dead_zone_bias: float = 0.0
    """Share of the sum of a row's zero-code weights that is added to its output (Tequila: 1e-3); 0 adds nothing."""
    hadamard: Literal["none", "outputs"] = "none"
    """``outputs``: a Hadamard transform before the quantiser of o_proj's and down_proj's inputs (BitNet v2)."""
    hadamard_block: int = 0
    """Features that are transformed together, a power of two; 0 takes the largest that divides each dimension."""
    hadamard_fold: bool = True
    """Fold the transform into those weights, so that the full-precision function stays what it was; without it (the
    paper, which trains from scratch) a trained model's is lost."""
    skip: tuple[str, ...] = ()
    """Glob patterns of linears that stay full precision, for example ``model.layers.0.*``."""
    calibration_sequences: int = 32
    """Corpus sequences that ``gain = "rms"``, ``gptq`` and ``awq`` read."""

    def __post_init__(self) -> None:
        check(self.block_size >= 1, "refine.block_size", self.block_size, "use a whole number >= 1")
        check(
            self.granularity == "block" or self.block_size == type(self).block_size,
            "refine.block_size",
            self.block_size,
            f'it is not used with granularity = "{self.granularity}"; set granularity = "block"',
        )
        check(self.dead_zone_bias >= 0, "refine.dead_zone_bias", self.dead_zone_bias, "use 0 or more")
        check(
            self.calibration_sequences >= 1,
            "refine.calibration_sequences",
            self.calibration_sequences,
            "use a whole number >= 1",
        )
        check(
            not (self.gain == "rms" and self.norm_sites == "none"),
            "refine.gain",
            self.gain,
            'there is no norm to calibrate with norm_sites = "none"; set gain = "one"',
        )
        check(self.gptq_damping >= 0, "refine.gptq_damping", self.gptq_damping, "use 0 or more")
        if self.initialisation != "gptq":
            check_unused(self, "refine", ("gptq_damping", "gptq_act_order"), 'set initialisation = "gptq"')
        check(
            not (self.gptq_act_order and self.granularity == "block"),
            "refine.gptq_act_order",
            self.gptq_act_order,
            "a block's scale is fixed when its columns are reached, which then lie apart; leave it out, or set "
            'granularity = "channel"',
        )
        if not self.is_calibrated:
            remedy = 'nothing is calibrated; set gain = "rms" or an initialisation'
            check_unused(self, "refine", ("calibration_sequences",), remedy)
        self._check_hadamard()

    def _check_hadamard(self) -> None:
        block = self.hadamard_block
        remedy = "use a power of two, or 0 for the largest that divides each dimension"
        check(block >= 0 and not block & (block - 1), "refine.hadamard_block", block, remedy)
        if self.hadamard == "none":
            check_unused(self, "refine", ("hadamard_block", "hadamard_fold"), 'set hadamard = "outputs"')
        check(
            self.hadamard == "none" or self.initialisation != "awq",
            "refine.initialisation",
            self.initialisation,
            "scales of channels do not pass a Hadamard transform; use gptq or absmean with hadamard",
        )

    @property
    def is_calibrated(self) -> bool:
        """Whether stage 1 reads text."""
        return self.gain == "rms" or self.initialisation != "absmean"

    def without_norms(self) -> "RefineConfig":
        """The section without SubLN, and with what would then be ignored at its default."""
        changes: dict[str, Any] = {"norm_sites": "none", "gain": "one"}
        if self.initialisation == "absmean":
            changes["calibration_sequences"] = type(self).calibration_sequences
        return replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(CorpusTrainingConfig):
    """Stage 2: continued pre-training on general text, CE + lambda_logits * logits KD of every token."""

    seed: int | None = None
    """Seed of the order of the text; the recipe's if not given. With one for all, runs of a study share stage 2."""
    lambda_logits: float = 0.0
    """Weight of the logits KD, for a ternary student alone (the FP16-CT control goes without); 0 switches it off."""
    temperature: float = 1.0
    """Temperature of the logits KD."""
    teacher: str = ""
    """Folder or hub id of its teacher; a ``run`` takes the full-precision model that the student was made of."""

    def __post_init__(self) -> None:
        super().__post_init__()
        remedy = "use a whole number from 0 to 2^32 - 1"
        check(self.seed is None or 0 <= self.seed < 2**32, "pretrain.seed", self.seed, remedy)
        check(self.lambda_logits >= 0, "pretrain.lambda_logits", self.lambda_logits, "use 0 or more")
        check(self.temperature > 0, "pretrain.temperature", self.temperature, "use a positive number")
        if not self.lambda_logits:
            remedy = "lambda_logits = 0 leaves the text as the only teacher; set lambda_logits"
            check_unused(self, "pretrain", ("temperature", "teacher"), remedy)

    @property
    def distillation(self) -> "DistillConfig | None":
        """The losses as stage 3 writes them; None where text alone teaches."""
        if not self.lambda_logits:
            return None
        return DistillConfig(
            teacher=self.teacher,
            lambda_logits=self.lambda_logits,
            temperature=self.temperature,
            kd_tokens="all",
            gamma_relation=0.0,
        )

    def taught_by(self, teacher: str) -> "PretrainConfig":
        """The section with a teacher, where it needs one and names none."""
        return replace(self, teacher=teacher) if self.lambda_logits and not self.teacher else self

    def without_teacher(self) -> "PretrainConfig":
        """The section as a full-precision model takes it: text alone."""
        default = type(self)
        return replace(self, lambda_logits=0.0, temperature=default.temperature, teacher=default.teacher)


@dataclass(frozen=True, kw_only=True)
class SftConfig(TrainingConfig):
    """Fine-tuning on the task with plain cross-entropy: the teacher and every baseline."""

    epochs: float = 2.0
    """Passes over the training data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.epochs > 0, "sft.epochs", self.epochs, "use a positive number")


KD_KEYS = {
    "lambda_logits": ("temperature", "tau_squared", "kd_tokens"),
    "gamma_relation": (
        "relation_form",
        "relation_heads",
        "relation_temperature",
        "relation_states",
        "relation_mask",
        "relation_layers",
        "teacher_layers",
    ),
}
"""Weights of the distillation losses -> the settings that mean nothing when the weight is 0."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig(TrainingConfig):
    """Stage 3: CE + lambda_logits * logits KD + gamma_relation * relation KD (BitDistill, eq. 13)."""

    preset: Literal["default", "paper", "authors"] = "default"
    """Values that the keys below start from; what is written wins."""
    epochs: float = 2.0
    """Passes over the training data."""
    teacher: str = ""
    """Folder or hub id of the fine-tuned teacher; a ``run`` fills in its row ``teacher_method``."""
    teacher_revision: str | None = None
    """Hub revision of ``teacher``."""
    teacher_method: Literal["fp16_sft", "fp16_ct_sft"] = "fp16_sft"
    """Full-precision row of a ``run`` that teaches; ``fp16_ct_sft`` has seen the stage-2 text, as the student has."""
    lambda_logits: float = 1.0
    """Weight of the logits KD; 0 switches it off."""
    gamma_relation: float = 1.0
    """Weight of the attention-relation KD; 0 switches it off."""
    temperature: float = 5.0
    """Temperature of the logits KD."""
    tau_squared: bool = False
    """Multiply the logits KD by temperature squared (the authors' code does, the paper does not)."""
    kd_tokens: Literal["response", "all"] = "response"
    """Tokens of the logits KD: those that predict the answer, or every real token."""
    relation_form: Literal["scaled_dot", "cosine"] = "scaled_dot"
    """``scaled_dot``: paper eq. 12; ``cosine``: Algorithm 1 and the authors' code."""
    relation_heads: int = 0
    """Heads that the concatenated states are split into; 0 keeps the model's own."""
    relation_temperature: float = 1.0
    """Temperature of the relation softmax."""
    relation_states: Literal["post_rope", "pre_rope"] = "post_rope"
    """Take Q and K after rotary embedding (the authors' code) or as projected; V is as projected."""
    relation_mask: Literal["padding", "causal", "none"] = "padding"
    """Which keys a query relates to; ``none`` lets padding in, as the authors' code does."""
    relation_layers: tuple[int, ...] = (-1,)
    """Student layers whose relations are distilled; negative counts from the last."""
    teacher_layers: tuple[int, ...] = ()
    """Teacher layers they are held against; empty takes those at the same relative depth."""
    teacher_cache: Literal["none", "hidden", "topk"] = "none"
    """Run the teacher once over the training data and keep what the losses need on disk: final ``hidden`` states, or
    the ``topk`` likeliest tokens and the mass of the rest; the states of the relation KD with either."""
    cache_top_k: int = 64
    """Entries of the vocabulary that ``topk`` keeps of a token; they should hold most mass at ``temperature``."""
    teacher_cache_dir: str = ""
    """Folder of the cache, made if it is not there; empty puts one into the run's folder, shared by its methods."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.epochs > 0, "distill.epochs", self.epochs, "use a positive number")
        for key in ("lambda_logits", "gamma_relation"):
            check(getattr(self, key) >= 0, f"distill.{key}", getattr(self, key), "use 0 or more")
        for key in ("temperature", "relation_temperature"):
            check(getattr(self, key) > 0, f"distill.{key}", getattr(self, key), "use a positive number")
        check(
            self.relation_heads >= 0,
            "distill.relation_heads",
            self.relation_heads,
            "use 0 (native) or more",
        )
        check(
            len(self.relation_layers) > 0,
            "distill.relation_layers",
            self.relation_layers,
            "name at least one layer, or set gamma_relation = 0",
        )
        check(
            len(self.teacher_layers) in (0, len(self.relation_layers)),
            "distill.teacher_layers",
            self.teacher_layers,
            "give as many as relation_layers, or none",
        )
        check(
            self.teacher_revision is None or bool(self.teacher),
            "distill.teacher_revision",
            self.teacher_revision,
            "it is not used without distill.teacher: name the teacher",
        )
        if self.teacher:
            remedy = "distill.teacher names the teacher; leave one of the two out"
            check_unused(self, "distill", ("teacher_method",), remedy)
        for weight, keys in KD_KEYS.items():
            if getattr(self, weight) == 0:
                check_unused(self, "distill", keys, f"{weight} = 0 switches that loss off; set {weight}")
        self._check_cache()

    def _check_cache(self) -> None:
        form = self.teacher_cache
        check(self.cache_top_k >= 1, "distill.cache_top_k", self.cache_top_k, "use a whole number >= 1")
        if form != "topk":
            check_unused(self, "distill", ("cache_top_k",), 'set teacher_cache = "topk"')
        if form == "none":
            check_unused(self, "distill", ("teacher_cache_dir",), 'set teacher_cache = "hidden" or "topk"')
            return
        relations = bool(self.gamma_relation)
        what = "distill.teacher_cache"
        check(relations or bool(self.lambda_logits), what, form, "no loss here needs a teacher; leave it out")
        remedy = 'lambda_logits = 0 leaves no logits to keep; set teacher_cache = "hidden"'
        check(form != "topk" or bool(self.lambda_logits), what, form, remedy)
        remedy = 'relation_mask = "none" relates padding, which a cache does not hold; set relation_mask = "padding"'
        check(not relations or self.relation_mask != "none", what, form, remedy)

    def without(self, weight: str) -> "DistillConfig":
        """The section with one loss of KD_KEYS switched off, and what would then be ignored at its default."""
        unused = KD_KEYS[weight]
        changes: dict[str, Any] = {weight: 0.0}
        if not any(getattr(self, other) for other in KD_KEYS if other != weight):
            unused += ("teacher_cache", "cache_top_k", "teacher_cache_dir")
        elif weight == "lambda_logits" and self.teacher_cache == "topk":
            unused += ("cache_top_k",)
            changes["teacher_cache"] = "hidden"
        return replace(self, **{key: getattr(type(self), key) for key in unused} | changes)
