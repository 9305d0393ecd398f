"""What a run reads: the model to convert, the general text, the task."""

from dataclasses import dataclass
from typing import Literal

from .checks import check, check_unused

TASK_KINDS: dict[str, Literal["classification", "generation", "summarisation"]] = {
    "sst2": "classification",
    "qnli": "classification",
    "mnli": "classification",
    "mnli_mismatched": "classification",
    "cnndm": "summarisation",
    "grammar": "classification",
}
"""What the built-in tasks are; a ``jsonl`` task says it itself."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The off-the-shelf model to convert."""

    source: str = ""
    """Local folder or Hugging Face hub id; empty when a ``[base]`` section makes the model."""
    revision: str | None = None
    """Hub revision of ``source``; other models that a command names come at their default one."""

    def __post_init__(self) -> None:
        check(
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
        check(
            self.sequence_length >= 8,
            "corpus.sequence_length",
            self.sequence_length,
            "use at least 8 tokens",
        )
        check(
            0 < self.pretrain_share <= 1,
            "corpus.pretrain_share",
            self.pretrain_share,
            "use a share in (0, 1]",
        )
        check(self.max_documents >= 0, "corpus.max_documents", self.max_documents, "use 0 or more")


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
    """Prompt with ``{column}`` placeholders, for a decoder; empty uses the built-in task's."""
    columns: tuple[str, ...] = ()
    """JSONL columns that an encoder reads: one, or two for a pair of texts. It has no prompt."""
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
    """Tokens per example, prompt and answer together; longer prompts lose their beginning (a document its end, and what
    an encoder reads too)."""
    max_train_examples: int = 0
    """Random subset of the training data, the same for every method; 0 keeps all."""
    max_validation_examples: int = 0
    """Random subset of what is held out to choose learning rates; 0: a quarter of ``max_train_examples``, or all."""
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
            check(self.kind == own, "task.kind", self.kind, remedy)
        check(self.max_length >= 8, "task.max_length", self.max_length, "use at least 8 tokens")
        for key in ("max_train_examples", "max_validation_examples"):
            check(getattr(self, key) >= 0, f"task.{key}", getattr(self, key), "use 0 or more")
        check(
            0 < self.validation_share < 1,
            "task.validation_share",
            self.validation_share,
            "use a share in (0, 1)",
        )
        check(self.max_new_tokens >= 1, "task.max_new_tokens", self.max_new_tokens, "use at least 1")
        check(len(self.labels) != 1, "task.labels", self.labels, "give two labels or more, or none at all")
        check(
            len(self.columns) <= 2,
            "task.columns",
            self.columns,
            "give one column, or two for a pair of texts",
        )
        check(
            not (self.columns and self.template),
            "task.columns",
            self.columns,
            "an encoder reads columns and a decoder a template; leave out task.template, or this",
        )
        if self.name == "grammar":
            check_unused(
                self, "task", ("data_dir",), 'the task is generated; set name = "jsonl" to read files'
            )
        if self.name != "jsonl":
            keys = ("columns", "label_column", "document_column", "train_file", "eval_file")
            check_unused(self, "task", keys, f'"{self.name}" has its own; set name = "jsonl"')
        if self.kind == "classification":
            check_unused(self, "task", ("max_new_tokens",), 'a label is short; set kind = "generation"')
        else:
            remedy = 'answers are free text; set kind = "classification"'
            check_unused(self, "task", ("labels", "scoring", "columns"), remedy)
        if self.kind != "summarisation":
            check_unused(self, "task", ("document_column",), 'set kind = "summarisation"')
