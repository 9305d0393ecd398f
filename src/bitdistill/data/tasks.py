"""Tasks: rows -> prompts and answers, split into train, validation and test.

Built-in tasks and JSONL files come out alike. The validation part is cut from the training data to choose
hyper-parameters; the evaluation file is for the final table only. Subsets and splits depend on the data
alone, so that every method and every seed of a study sees the same examples.
"""

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import digest_of
from ..config import TaskConfig
from ..errors import ConfigError, DataError
from . import glue, grammar, summaries
from .rows import Row, Rows, Source, one_by_one, read_jsonl_rows

SPLIT_SEED = 0
"""Seed of the validation split and the training subset; not the recipe's, see above."""


@dataclass(frozen=True)
class Example:
    """One item: the prompt and the answer that should follow it."""

    prompt: str
    answer: str
    label: int | None
    """Index of the answer among the labels; None for free text."""
    tail: str = ""
    """End of the prompt that always stays. Where there is one, a prompt that is too long loses the end of ``prompt``
    (of the document in it) instead of its beginning."""
    segments: tuple[str, ...] = ()
    """What an encoder reads in place of the prompt: one text, or two; nothing where the task is free text."""


@dataclass(frozen=True)
class Task:
    """A loaded task."""

    name: str
    kind: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    lead: tuple[str, ...] = ()
    """Summarisation: the first three sentences of every test document, the usual baseline."""
    classes: tuple[str, ...] = ()
    """Classification: what the data calls the labels, or else their texts; names of an encoder's classes."""

    @property
    def digest(self) -> str:
        """Digest of everything a model is trained and judged on."""
        parts = [_contents(part) for part in (self.train, self.validation, self.test)]
        return digest_of([self.kind, self.labels, parts])

    def part_digest(self, name: str) -> str:
        """Digest of the examples of one part: rows that share it can be held against each other item by item."""
        return digest_of(_contents(self.part(name)))

    def part(self, name: str) -> tuple[Example, ...]:
        """The examples of ``train``, ``validation`` or ``test``."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]

    def majority_accuracy(self, part: str = "test") -> float | None:
        """Accuracy of always answering the commonest label of a part."""
        if self.kind != "classification":
            return None
        examples = self.part(part)
        counts = [sum(e.label == i for e in examples) for i in range(len(self.labels))]
        return max(counts) / len(examples)


def _contents(part: Sequence[Example]) -> list[tuple[str, ...]]:
    return [(e.prompt, e.answer, *filter(None, [e.tail]), *(() if e.prompt else e.segments)) for e in part]


def load_task(config: TaskConfig) -> Task:
    """Load, check, split and subsample a task.

    Raises:
        DataError: files are missing or empty, a column is absent, or a label is not one of the task's.
        ConfigError: the task is unknown or its template or labels are missing.
    """
    source = _SOURCES.get(config.name)
    if source is None:
        raise ConfigError(f"task.name = {config.name!r}: use one of {', '.join(_SOURCES)}")
    template = config.template or source.template
    labels = config.labels or source.labels
    label_column = source.label_column or config.label_column
    document_column = ""
    if config.kind == "summarisation":
        document_column = source.document_column or config.document_column
    columns = config.columns or source.columns
    if not template and not columns:
        raise ConfigError(
            "task.template is empty: write the prompt with {column} placeholders, such as 'Q: {text}\\nA:' "
            "(for an encoder, the columns that it reads in task.columns)"
        )
    if config.kind == "classification" and not labels:
        raise ConfigError(
            "task.labels is empty: give the label texts in the order of their values, such as [' no', ' yes']"
        )
    stripped = [label.strip() for label in labels]
    if len(set(stripped)) != len(stripped):
        raise ConfigError(f"task.labels = {labels!r}: two labels are the same")
    if source.values and len(labels) != len(source.values):
        raise ConfigError(f"task.labels = {labels!r}: give one for each of {', '.join(source.values)}")
    rows, test_rows = source.read(config)
    groups = source.groups(rows)
    build = _ExampleBuilder(
        config.kind, template, columns, labels, source.values, label_column, document_column
    )
    examples = [build(row, f"training row {i + 1}") for i, row in enumerate(rows)]
    test = [build(row, f"evaluation row {i + 1}") for i, row in enumerate(test_rows)]
    if not test:
        raise DataError(f"task {config.name}: the evaluation data is empty")
    train, validation = _split(examples, groups, config)
    if config.kind == "classification" and len({e.label for e in train}) < 2:
        raise DataError(
            f"task {config.name}: all {len(train)} training examples have the same label; "
            f"check task.label_column ({label_column})"
        )
    lead = tuple(summaries.lead(str(row[document_column])) for row in test_rows) if document_column else ()
    classes = source.values or tuple(stripped)
    return Task(config.name, config.kind, labels, tuple(train), tuple(validation), tuple(test), lead, classes)


def _split(
    examples: list[Example], groups: list[tuple[int, ...]], config: TaskConfig
) -> tuple[list[Example], list[Example]]:
    """Hold out groups for validation, then subsample the rest.

    A row is held out if all its groups are and trained on if none is; one between the two sides is on neither.
    """
    rng = random.Random(SPLIT_SEED)
    members: dict[int, list[int]] = {}
    for index, row_groups in enumerate(groups):
        for group in row_groups:
            members.setdefault(group, []).append(index)
    order = sorted(members)
    rng.shuffle(order)
    wanted = config.validation_share * len(examples)
    kept = [len(row_groups) for row_groups in groups]  # groups of each row that are not held out
    count = 0
    for group in order:
        if count >= wanted:
            break
        for index in members[group]:
            kept[index] -= 1
            count += kept[index] == 0
    train = [e for e, row_groups, k in zip(examples, groups, kept, strict=True) if k == len(row_groups)]
    validation = [e for e, k in zip(examples, kept, strict=True) if k == 0]
    if not train or not validation:
        raise DataError(
            f"task {config.name}: {len(examples)} training examples are too few to hold out "
            f"validation_share = {config.validation_share}"
        )
    rng.shuffle(train)
    rng.shuffle(validation)
    most = config.max_validation_examples
    if config.max_train_examples:
        train = train[: config.max_train_examples]
        most = most or max(1, config.max_train_examples // 4)
    return train, validation[: most or None]


class _ExampleBuilder:
    """Row -> Example, with an error that names the row and the remedy."""

    def __init__(
        self,
        kind: str,
        template: str,
        segments: tuple[str, ...],
        labels: tuple[str, ...],
        values: tuple[str, ...],
        label_column: str,
        document_column: str,
    ) -> None:
        self.kind, self.segments, self.labels, self.label_column = kind, segments, labels, label_column
        self.names = [list(values), [label.strip() for label in labels]]
        """What a label may be called in the data, in the order of the labels; an index does as well."""
        try:
            self.columns = [name for _, name, _, _ in string.Formatter().parse(template) if name]
            template.format(**dict.fromkeys(self.columns, ""))
        except (ValueError, LookupError, AttributeError) as error:
            raise ConfigError(
                f"task.template = {template!r}: {error}; write {{column}} for a column, {{{{ for a brace"
            ) from error
        if template and not self.columns:
            raise ConfigError(f"task.template = {template!r}: it names no {{column}}")
        self.head, self.tail = template, ""
        if document_column:
            marker = f"{{{document_column}}}"
            if template.count(marker) != 1 or template.endswith(marker):
                raise ConfigError(
                    f"task.template = {template!r}: write {marker} once and something behind it, such as "
                    f"'{marker}\\nTL;DR:'; task.document_column names the column to summarise"
                )
            before, _, self.tail = template.partition(marker)
            self.head = before + marker

    def __call__(self, row: Row, where: str) -> Example:
        for column in (*self.columns, *self.segments, self.label_column):
            if column not in row or row[column] is None:
                raise DataError(
                    f"{where}: no column {column!r}; it has {', '.join(map(str, row))}. "
                    "Check task.template (for an encoder, task.columns) and task.label_column."
                )
        texts = {c: str(row[c]).strip() for c in self.columns}
        prompt, tail = self.head.format(**texts), self.tail.format(**texts)
        value = row[self.label_column]
        if self.kind == "generation":
            return Example(prompt, str(value), None)
        if self.kind == "summarisation":
            return Example(prompt, f" {str(value).strip()}", None, tail)
        index = self._label_index(value, where)
        segments = tuple(str(row[column]).strip() for column in self.segments)
        return Example(prompt, self.labels[index], index, segments=segments)

    def _label_index(self, value: Any, where: str) -> int:
        text = str(value).strip()
        for names in self.names:
            if text in names:
                return names.index(text)
        # Labels that are numbers themselves leave no room for indices: 1 would mean two things.
        if text.isdecimal() and int(text) < len(self.labels) and not any(map(str.isdecimal, self.names[-1])):
            return int(text)
        raise DataError(
            f"{where}: label {value!r} is not one of {', '.join(self.names[0] + self.names[1])} "
            f"nor an index below {len(self.labels)}; check task.labels and task.label_column"
        )


def _read_jsonl_task(config: TaskConfig) -> tuple[Rows, Rows]:
    if not config.data_dir:
        raise ConfigError("task.data_dir is empty: name the folder that holds the JSONL files")
    folder = Path(config.data_dir)
    return read_jsonl_rows(folder / config.train_file), read_jsonl_rows(folder / config.eval_file)


def _read_grammar(config: TaskConfig) -> tuple[Rows, Rows]:
    del config
    return grammar.task_rows("train"), grammar.task_rows("test")


_SOURCES = {
    "sst2": glue.SST2,
    "qnli": glue.QNLI,
    "mnli": glue.MNLI,
    "mnli_mismatched": glue.MNLI_MISMATCHED,
    "cnndm": summaries.CNNDM,
    "grammar": Source(
        read=_read_grammar,
        groups=one_by_one,
        template="{text}",
        columns=("text",),
        labels=(" bored me", " pleased me"),
        label_column="label",
    ),
    "jsonl": Source(read=_read_jsonl_task, groups=one_by_one),
}
