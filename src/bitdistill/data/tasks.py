"""Tasks: rows -> prompts and answers, split into train, validation and test.

Built-in tasks and JSONL files come out alike. The validation part is cut from the training data to choose
hyper-parameters; the evaluation file is for the final table only. Subsets and splits depend on the data
alone, so that every method and every seed of a study sees the same examples.
"""

import csv
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import digest_of
from ..config import TaskConfig
from ..errors import ConfigError, DataError
from . import grammar
from .textfile import read_jsonl, read_lines

SPLIT_SEED = 0
"""Seed of the validation split and the training subset; not the recipe's, see above."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One item: the prompt and the answer that should follow it."""

    prompt: str
    answer: str
    label: int | None
    """Index of the answer among the labels; None for generation."""


@dataclass(frozen=True)
class Task:
    """A loaded task."""

    name: str
    kind: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]

    @property
    def digest(self) -> str:
        """Digest of everything a model is trained and judged on."""
        parts = [[(e.prompt, e.answer) for e in part] for part in (self.train, self.validation, self.test)]
        return digest_of([self.kind, self.labels, parts])

    @property
    def majority_accuracy(self) -> float | None:
        """Test accuracy of always answering the commonest label."""
        if self.kind != "classification":
            return None
        counts = [sum(e.label == i for e in self.test) for i in range(len(self.labels))]
        return max(counts) / len(self.test)


@dataclass(frozen=True)
class _Source:
    """How a task's rows are found, and what its recipe section defaults to."""

    template: str
    labels: tuple[str, ...]
    label_column: str
    read: Callable[[TaskConfig], tuple[list[Row], list[Row]]]
    groups: Callable[[Sequence[Row]], list[tuple[int, ...]]]
    """The groups that each row belongs to."""


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
    if not template:
        raise ConfigError(
            "task.template is empty: write the prompt with {column} placeholders, such as 'Q: {text}\\nA:'"
        )
    if config.kind == "classification" and not labels:
        raise ConfigError(
            "task.labels is empty: give the label texts in the order of their values, such as [' no', ' yes']"
        )
    stripped = [label.strip() for label in labels]
    if len(set(stripped)) != len(stripped):
        raise ConfigError(f"task.labels = {labels!r}: two labels are the same")
    rows, test_rows = source.read(config)
    groups = source.groups(rows)
    build = _ExampleBuilder(config.kind, template, labels, label_column)
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
    return Task(config.name, config.kind, labels, tuple(train), tuple(validation), tuple(test))


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
    if config.max_train_examples:
        train = train[: config.max_train_examples]
        validation = validation[: max(1, config.max_train_examples // 4)]
    return train, validation


class _ExampleBuilder:
    """Row -> Example, with an error that names the row and the remedy."""

    def __init__(self, kind: str, template: str, labels: tuple[str, ...], label_column: str) -> None:
        self.kind, self.template, self.labels, self.label_column = kind, template, labels, label_column
        try:
            self.columns = [name for _, name, _, _ in string.Formatter().parse(template) if name]
            template.format(**dict.fromkeys(self.columns, ""))
        except (ValueError, LookupError, AttributeError) as error:
            raise ConfigError(
                f"task.template = {template!r}: {error}; write {{column}} for a column, {{{{ for a brace"
            ) from error
        if not self.columns:
            raise ConfigError(f"task.template = {template!r}: it names no {{column}}")

    def __call__(self, row: Row, where: str) -> Example:
        for column in (*self.columns, self.label_column):
            if column not in row or row[column] is None:
                raise DataError(
                    f"{where}: no column {column!r}; it has {', '.join(map(str, row))}. "
                    "Check task.template and task.label_column."
                )
        prompt = self.template.format(**{c: str(row[c]).strip() for c in self.columns})
        value = row[self.label_column]
        if self.kind == "generation":
            return Example(prompt, str(value), None)
        index = self._label_index(value, where)
        return Example(prompt, self.labels[index], index)

    def _label_index(self, value: Any, where: str) -> int:
        text = str(value).strip()
        stripped = [label.strip() for label in self.labels]
        if text in stripped:
            return stripped.index(text)
        # Labels that are numbers themselves leave no room for indices: 1 would mean two things.
        if text.isdecimal() and int(text) < len(stripped) and not any(map(str.isdecimal, stripped)):
            return int(text)
        raise DataError(
            f"{where}: label {value!r} is not one of {', '.join(stripped)} "
            f"nor an index below {len(self.labels)}; check task.labels and task.label_column"
        )


def _local_files(config: TaskConfig) -> tuple[str, str]:
    return ("train.tsv", "dev.tsv") if config.name == "sst2" else (config.train_file, config.eval_file)


def _read_sst2(config: TaskConfig) -> tuple[list[Row], list[Row]]:
    if config.data_dir:
        train, test = (Path(config.data_dir) / name for name in _local_files(config))
        return _read_tsv(train), _read_tsv(test)
    return _read_hub("nyu-mll/glue", "sst2", "train"), _read_hub("nyu-mll/glue", "sst2", "validation")


def _read_jsonl_task(config: TaskConfig) -> tuple[list[Row], list[Row]]:
    if not config.data_dir:
        raise ConfigError("task.data_dir is empty: name the folder that holds the JSONL files")
    train, test = (Path(config.data_dir) / name for name in _local_files(config))
    return _read_jsonl(train), _read_jsonl(test)


def _read_grammar(config: TaskConfig) -> tuple[list[Row], list[Row]]:
    del config
    return grammar.task_rows("train"), grammar.task_rows("test")


def _read_tsv(path: Path) -> list[Row]:
    rows = csv.DictReader(read_lines(path, "task.data_dir"), delimiter="\t", quoting=csv.QUOTE_NONE)
    return _not_empty(list(rows), path)


def _read_jsonl(path: Path) -> list[Row]:
    return _not_empty([row for _, row in read_jsonl(path, "task.data_dir")], path)


def _not_empty(rows: list[Row], path: Path) -> list[Row]:
    if not rows:
        raise DataError(f"{path}: no rows; the data set is empty")
    return rows


def _read_hub(name: str, subset: str, split: str) -> list[Row]:
    import datasets

    try:
        return list(datasets.load_dataset(name, subset, split=split))
    except Exception as error:  # datasets raises many unrelated types for "not there" and "no network"
        raise DataError(
            f"the hub gave no data for {name}/{subset} ({error}); "
            "download it and set task.data_dir to its folder"
        ) from error


def _one_by_one(rows: Sequence[Row]) -> list[tuple[int, ...]]:
    """Every row is a group of its own."""
    return [(index,) for index in range(len(rows))]


def sentences_around(rows: Sequence[Row]) -> list[tuple[int, ...]]:
    """The sentences around every SST-2 row: indices of the texts that hold it and are in no longer text themselves.

    SST-2's training rows are phrases cut from its sentences, so a random split would put a phrase on one side and
    the sentence around it on the other. Nor can everything that nests be one group: through short phrases ("the
    film") all but 8 rows of 67,349 hang together. So a phrase belongs to every sentence that holds it, and one of
    sentences on both sides is dropped (2.4 % of the rows): no text of one side then holds a text of the other.
    """
    texts = [tuple(str(row["sentence"]).split()) for row in rows]
    around: dict[tuple[str, ...], list[int]] = {text: [] for text in texts}
    for index in sorted(range(len(texts)), key=lambda i: -len(texts[i])):
        words = texts[index]
        if around[words]:  # in a longer text, or the same as an earlier one
            continue
        phrases = {
            words[start:end] for start in range(len(words)) for end in range(start + 1, len(words) + 1)
        }
        for phrase in phrases | {words}:
            if phrase in around:
                around[phrase].append(index)
    return [tuple(around[text]) for text in texts]


_SOURCES = {
    "sst2": _Source(
        template="{sentence} It was",
        labels=(" terrible", " great"),
        label_column="label",
        read=_read_sst2,
        groups=sentences_around,
    ),
    "grammar": _Source(
        template="{text}",
        labels=(" bored me", " pleased me"),
        label_column="label",
        read=_read_grammar,
        groups=_one_by_one,
    ),
    "jsonl": _Source(template="", labels=(), label_column="", read=_read_jsonl_task, groups=_one_by_one),
}
