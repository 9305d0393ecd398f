"""What a recipe can say: frozen dataclasses, one per section. The only place that holds defaults."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from .errors import ConfigError

METHODS = ("fp16_sft", "fp16_ct_sft", "bitnet_sft", "bitdistill")
"""FP16-SFT is the teacher; FP16-CT-SFT the full-precision control that also sees the stage-2 text; BitNet-SFT the
direct ternary fine-tune; BitDistill the three stages."""

TASK_KINDS: dict[str, Literal["classification", "generation", "summarisation"]] = {
    "sst2": "classification",
    "qnli": "classification",
    "mnli": "classification",
    "mnli_mismatched": "classification",
    "cnndm": "summarisation",
    "grammar": "classification",
}
"""What the built-in tasks are; a ``jsonl`` task says it itself."""

ABLATIONS = ("no_subln", "no_pretrain", "no_distill", "no_logits_kd", "no_relation_kd")
"""Switches written behind a method, as in ``bitdistill:no_pretrain`` or ``bitdistill:no_subln+no_distill``."""


def _check(ok: bool, key: str, value: object, remedy: str) -> None:
    if not ok:
        raise ConfigError(f"{key} = {value!r}: {remedy}")


def _check_unused(config: Any, section: str, keys: Iterable[str], remedy: str) -> None:
    """A setting that would be ignored is an error, unless it is at its default."""
    for key in keys:
        value = getattr(config, key)
        _check(
            value == getattr(type(config), key), f"{section}.{key}", value, f"it is not used here: {remedy}"
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The off-the-shelf model to convert."""

    source: str = ""
    """Local folder or Hugging Face hub id; empty when a ``[base]`` section makes the model."""
    revision: str | None = None
    """Hub revision of ``source``; other models that a command names come at their default one."""

    def __post_init__(self) -> None:
        _check(
            self.revision is None or bool(self.source),
            "model.revision",
            self.revision,
            "it is not used without model.source: name the model",
        )


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """General text for continued pre-training (and for a base made from scratch)."""

    source: str = ""
    """File or folder of .txt / .jsonl / .parquet, ``hub:NAME[:CONFIG[:SPLIT]]``, or ``grammar`` (built in)."""
    text_column: str = "text"
    """Column that holds the text in JSONL, parquet and hub data."""
    sequence_length: int = 256
    """Tokens per training sequence; documents are packed, separated by the end-of-text token."""
    pretrain_share: float = 0.2
    """Share of the documents kept for stage 2; the base, if made here, sees only the others."""
    max_documents: int = 0
    """Stop after this many documents; 0 reads all. Needed for endless hub streams."""

    def __post_init__(self) -> None:
        _check(
            self.sequence_length >= 8,
            "corpus.sequence_length",
            self.sequence_length,
            "use at least 8 tokens",
        )
        _check(
            0 < self.pretrain_share <= 1,
            "corpus.pretrain_share",
            self.pretrain_share,
            "use a share in (0, 1]",
        )
        _check(self.max_documents >= 0, "corpus.max_documents", self.max_documents, "use 0 or more")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """The task the student is for."""

    name: str = "sst2"
    """``sst2``, ``qnli``, ``mnli`` (``mnli_mismatched``: judged on the other development set), ``cnndm``, ``grammar``
    (generated) or ``jsonl`` (yours, with the fields below)."""
    data_dir: str = ""
    """Folder with the data, as GLUE or the hub give it; empty loads a built-in task from the Hugging Face hub."""
    kind: Literal["auto", "classification", "generation", "summarisation"] = "auto"
    """Classification is judged by accuracy, generation by exact match, summarisation by ROUGE-Lsum with ROUGE-1/2/L
    and BLEU beside it. ``auto``: the built-in task's own; classification for ``jsonl``."""
    scoring: Literal["likelihood", "generation"] = "likelihood"
    """How a classifier answers: the label with the highest log-likelihood, or greedy text that begins with a label."""
    template: str = ""
    """Prompt with ``{column}`` placeholders; empty uses the built-in task's."""
    labels: tuple[str, ...] = ()
    """Text of each label, in the order of the label values 0, 1, ...; empty uses the built-in task's."""
    label_column: str = "label"
    """JSONL column with the label (its index or its text), or with the target text of the other kinds."""
    document_column: str = "article"
    """JSONL column with the text to summarise; where a prompt is too long, this column loses its end."""
    train_file: str = "train.jsonl"
    """JSONL training file inside ``data_dir``."""
    eval_file: str = "eval.jsonl"
    """JSONL evaluation file inside ``data_dir``; used once, for the final table."""
    max_length: int = 512
    """Tokens per example, prompt and answer together; longer prompts lose their beginning (a document its end)."""
    max_train_examples: int = 0
    """Random subset of the training data, the same for every method; 0 keeps all."""
    validation_share: float = 0.1
    """Share of the training data held out to choose learning rates; related items stay together."""
    max_new_tokens: int = 128
    """Longest generated answer, in tokens; a summary to train on that is longer loses its end."""

    def __post_init__(self) -> None:
        own = TASK_KINDS.get(self.name, "classification")
        if self.kind == "auto":
            object.__setattr__(self, "kind", own)  # what is recorded is what was run
        if self.name in TASK_KINDS:
            remedy = f'"{self.name}" is {own}; leave it out, or set name = "jsonl"'
            _check(self.kind == own, "task.kind", self.kind, remedy)
        _check(self.max_length >= 8, "task.max_length", self.max_length, "use at least 8 tokens")
        _check(
            self.max_train_examples >= 0,
            "task.max_train_examples",
            self.max_train_examples,
            "use 0 or more",
        )
        _check(
            0 < self.validation_share < 1,
            "task.validation_share",
            self.validation_share,
            "use a share in (0, 1)",
        )
        _check(self.max_new_tokens >= 1, "task.max_new_tokens", self.max_new_tokens, "use at least 1")
        _check(len(self.labels) != 1, "task.labels", self.labels, "give two labels or more, or none at all")
        if self.name == "grammar":
            _check_unused(
                self, "task", ("data_dir",), 'the task is generated; set name = "jsonl" to read files'
            )
        if self.name != "jsonl":
            keys = ("label_column", "document_column", "train_file", "eval_file")
            _check_unused(self, "task", keys, f'"{self.name}" has its own; set name = "jsonl"')
        if self.kind == "classification":
            _check_unused(self, "task", ("max_new_tokens",), 'a label is short; set kind = "generation"')
        else:
            remedy = 'answers are free text; set kind = "classification"'
            _check_unused(self, "task", ("labels", "scoring"), remedy)
        if self.kind != "summarisation":
            _check_unused(self, "task", ("document_column",), 'set kind = "summarisation"')


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What every training step has in common."""

    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    batch_size: int = 32
    """Sequences per micro-batch and process."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    schedule: Literal["cosine", "linear", "two_stage", "constant"] = "cosine"
    """``two_stage``: linear decay, dropped halfway to ``two_stage_drop`` of its line (b1.58 training tips)."""
    two_stage_drop: float = 0.5
    """Factor on the learning rate in the second half of ``two_stage``."""
    warmup_ratio: float = 0.05
    """Share of the steps with linear warm-up."""
    weight_decay: float = 0.01
    """Decoupled weight decay on matrices; norms and biases have none."""
    weight_decay_schedule: Literal["constant", "half_then_zero"] = "constant"
    """``half_then_zero`` switches weight decay off in the second half (b1.58 training tips)."""
    max_grad_norm: float = 1.0
    """Gradient clipping by global norm; 0 disables it."""
    adam_beta2: float = 0.95
    """Second moment decay of AdamW (the first is 0.9)."""
    quant_warmup_ratio: float = 0.0
    """Share of the steps in which quantisation is mixed in, lambda rising from 0 to 1; ternary models only."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute precision; latents stay fp32. ``auto`` is bf16 where the device has it in hardware."""
    save_every: int = 200
    """Optimizer steps between checkpoints: the most that a kill can lose."""
    log_every: int = 10
    """Optimizer steps between lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        section = type(self).__name__.removesuffix("Config").lower()
        _check(
            self.learning_rate > 0,
            f"{section}.learning_rate",
            self.learning_rate,
            "use a positive number",
        )
        for key in ("batch_size", "gradient_accumulation_steps", "save_every", "log_every"):
            _check(getattr(self, key) >= 1, f"{section}.{key}", getattr(self, key), "use a whole number >= 1")
        for key in ("warmup_ratio", "quant_warmup_ratio"):
            _check(
                0 <= getattr(self, key) <= 1,
                f"{section}.{key}",
                getattr(self, key),
                "use a share in [0, 1]",
            )
        for key in ("weight_decay", "max_grad_norm"):
            _check(getattr(self, key) >= 0, f"{section}.{key}", getattr(self, key), "use 0 or more")
        _check(
            0 < self.two_stage_drop <= 1,
            f"{section}.two_stage_drop",
            self.two_stage_drop,
            "use (0, 1]",
        )
        _check(0 < self.adam_beta2 < 1, f"{section}.adam_beta2", self.adam_beta2, "use (0, 1)")
        if self.schedule != "two_stage":
            _check_unused(self, section, ("two_stage_drop",), 'set schedule = "two_stage"')


@dataclass(frozen=True, kw_only=True)
class BaseConfig(TrainingConfig):
    """A full-precision Qwen3-architecture base made from scratch, where no trained one can be had."""

    continue_from: str = ""
    """Checkpoint of an earlier base to go on from, on the same part of the corpus; empty starts from random weights."""
    tokens: int = 10_000_000
    """Training budget in tokens."""
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
    """Width of one head; heads x head_dim need not equal hidden_size."""
    tie_word_embeddings: bool = True
    """Share the embedding with the output head."""
    initializer_range: float = 0.02
    """Standard deviation of the random weights; narrow models start faster with about hidden_size^-0.5."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.tokens >= 1, "base.tokens", self.tokens, "give a positive training budget in tokens")
        _check(
            self.vocab_size >= 260,
            "base.vocab_size",
            self.vocab_size,
            "use at least 260 (256 bytes and the special tokens)",
        )
        _check(
            self.initializer_range > 0,
            "base.initializer_range",
            self.initializer_range,
            "use a positive number",
        )
        layers = ("hidden_size", "intermediate_size", "num_hidden_layers")
        sizes = (*layers, "num_attention_heads", "num_key_value_heads", "head_dim")
        for key in sizes:
            _check(getattr(self, key) >= 1, f"base.{key}", getattr(self, key), "use a whole number >= 1")
        if self.continue_from:
            shape = ("vocab_size", *sizes, "tie_word_embeddings", "initializer_range")
            _check_unused(
                self, "base", shape, "the checkpoint of base.continue_from has its own; leave it out"
            )
        _check(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "base.num_key_value_heads",
            self.num_key_value_heads,
            f"it must divide num_attention_heads = {self.num_attention_heads}",
        )


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
    skip: tuple[str, ...] = ()
    """Glob patterns of linears that stay full precision, for example ``model.layers.0.*``."""
    calibration_sequences: int = 32
    """Corpus sequences read for ``gain = "rms"``."""

    def __post_init__(self) -> None:
        _check(self.block_size >= 1, "refine.block_size", self.block_size, "use a whole number >= 1")
        _check(
            self.granularity == "block" or self.block_size == type(self).block_size,
            "refine.block_size",
            self.block_size,
            f'it is not used with granularity = "{self.granularity}"; set granularity = "block"',
        )
        _check(
            self.calibration_sequences >= 1,
            "refine.calibration_sequences",
            self.calibration_sequences,
            "use a whole number >= 1",
        )
        _check(
            not (self.gain == "rms" and self.norm_sites == "none"),
            "refine.gain",
            self.gain,
            'there is no norm to calibrate with norm_sites = "none"; set gain = "one"',
        )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
    """Stage 2: continued pre-training on general text."""

    tokens: int = 1_000_000
    """Training budget in tokens; the corpus is repeated if it holds fewer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.tokens >= 1, "pretrain.tokens", self.tokens, "give a positive training budget in tokens")


@dataclass(frozen=True, kw_only=True)
class SftConfig(TrainingConfig):
    """Fine-tuning on the task with plain cross-entropy: the teacher and every baseline."""

    epochs: float = 2.0
    """Passes over the training data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.epochs > 0, "sft.epochs", self.epochs, "use a positive number")


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

    epochs: float = 2.0
    """Passes over the training data."""
    teacher: str = ""
    """Folder or hub id of the fine-tuned teacher; a ``run`` fills in its FP16-SFT."""
    teacher_revision: str | None = None
    """Hub revision of ``teacher``."""
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

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.epochs > 0, "distill.epochs", self.epochs, "use a positive number")
        for key in ("lambda_logits", "gamma_relation"):
            _check(getattr(self, key) >= 0, f"distill.{key}", getattr(self, key), "use 0 or more")
        for key in ("temperature", "relation_temperature"):
            _check(getattr(self, key) > 0, f"distill.{key}", getattr(self, key), "use a positive number")
        _check(
            self.relation_heads >= 0,
            "distill.relation_heads",
            self.relation_heads,
            "use 0 (native) or more",
        )
        _check(
            len(self.relation_layers) > 0,
            "distill.relation_layers",
            self.relation_layers,
            "name at least one layer, or set gamma_relation = 0",
        )
        _check(
            len(self.teacher_layers) in (0, len(self.relation_layers)),
            "distill.teacher_layers",
            self.teacher_layers,
            "give as many as relation_layers, or none",
        )
        _check(
            self.teacher_revision is None or bool(self.teacher),
            "distill.teacher_revision",
            self.teacher_revision,
            "it is not used without distill.teacher: name the teacher",
        )
        for weight, keys in KD_KEYS.items():
            if getattr(self, weight) == 0:
                _check_unused(self, "distill", keys, f"{weight} = 0 switches that loss off; set {weight}")

    def without(self, weight: str) -> "DistillConfig":
        """The section with one loss of KD_KEYS switched off, and what would then be ignored at its default."""
        changes: dict[str, Any] = {key: getattr(type(self), key) for key in KD_KEYS[weight]}
        return replace(self, **changes | {weight: 0.0})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What ``bitdistill run`` compares."""

    methods: tuple[str, ...] = METHODS
    """Rows of the table: a method of METHODS, with ablations behind a colon if wanted."""
    learning_rates: tuple[float, ...] = ()
    """Grid for every task fine-tune, chosen on held-out training data; empty uses each section's own."""

    def __post_init__(self) -> None:
        _check(len(self.methods) > 0, "run.methods", self.methods, f"use some of {', '.join(METHODS)}")
        for method in self.methods:
            name, _, switches = method.partition(":")
            _check(name in METHODS, "run.methods", method, f"use one of {', '.join(METHODS)}")
            for switch in filter(None, switches.split("+")):
                _check(
                    switch in ABLATIONS,
                    "run.methods",
                    method,
                    f"ablations are {', '.join(ABLATIONS)}",
                )
            _check(
                not switches or name == "bitdistill",
                "run.methods",
                method,
                "ablations go with bitdistill only",
            )
            idle = {"no_logits_kd", "no_relation_kd"} & set(switches.split("+"))
            _check(
                "no_distill" not in switches.split("+") or not idle,
                "run.methods",
                method,
                f"no_distill leaves no teacher to learn from; drop {' and '.join(sorted(idle))}",
            )
        for rate in self.learning_rates:
            _check(rate > 0, "run.learning_rates", rate, "use positive numbers")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole recipe; every section has defaults, so a file holds only what differs."""

    name: str
    """Name of the run; its results go to ``<output_dir>/<name>``."""
    output_dir: str = "runs"
    """Folder of all runs."""
    seed: int = 0
    """Seed of weights, sample order and subsets."""
    model: ModelConfig = field(default_factory=ModelConfig)
    base: BaseConfig | None = None
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _check(bool(self.name.strip()), "name", self.name, "give the run a name")
        _check(0 <= self.seed < 2**32, "seed", self.seed, "use a whole number from 0 to 2^32 - 1")
        _check(
            not (self.model.source and self.base),
            "model.source",
            self.model.source,
            "a recipe has either model.source or a [base] section, not both",
        )

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.name

    def revision_of(self, source: str | Path) -> str | None:
        """The hub revision to load a checkpoint at: the recipe's for the recipe's model, none for any other."""
        return self.model.revision if str(source) == self.model.source else None
