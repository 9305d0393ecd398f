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
    group: Callable[[Sequence[Row]], list[int]] | None = None


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
    groups = source.group(rows) if source.group else list(range(len(rows)))
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
    examples: list[Example], groups: list[int], config: TaskConfig
) -> tuple[list[Example], list[Example]]:
    """Hold out whole groups for validation, then subsample the rest."""
    rng = random.Random(SPLIT_SEED)
    order = sorted(set(groups))
    rng.shuffle(order)
    wanted = config.validation_share * len(examples)
    sizes: dict[int, int] = {}
    for group in groups:
        sizes[group] = sizes.get(group, 0) + 1
    held: set[int] = set()
    count = 0
    for group in order:
        if count >= wanted:
            break
        held.add(group)
        count += sizes[group]
    train = [e for e, group in zip(examples, groups, strict=True) if group not in held]
    validation = [e for e, group in zip(examples, groups, strict=True) if group in held]
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


def group_nested_phrases(rows: Sequence[Row]) -> list[int]:
    """Group SST-2 rows by the longest text that contains them as a run of whole words.

    SST-2's training rows are phrases cut from its sentences, so a random split would put a phrase on one
    side and the sentence around it on the other.
    """
    texts = [str(row["sentence"]).split() for row in rows]
    group_of_span: dict[tuple[str, ...], int] = {}
    groups = [0] * len(texts)
    for index in sorted(range(len(texts)), key=lambda i: -len(texts[i])):
        words = tuple(texts[index])
        if words not in group_of_span:
            for start in range(len(words)):
                for end in range(start + 1, len(words) + 1):
                    group_of_span.setdefault(words[start:end], index)
        groups[index] = group_of_span.get(words, index)
    return groups


_SOURCES = {
    "sst2": _Source(
        template="{sentence} It was",
        labels=(" terrible", " great"),
        label_column="label",
        read=_read_sst2,
        group=group_nested_phrases,
    ),
    "grammar": _Source(
        template="{text}",
        labels=(" bored me", " pleased me"),
        label_column="label",
        read=_read_grammar,
    ),
    "jsonl": _Source(template="", labels=(), label_column="", read=_read_jsonl_task),
}
