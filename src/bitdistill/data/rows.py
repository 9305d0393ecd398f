"""Where a task's rows come from: local files in the forms that data sets are published in, or the hub.

A data set of the hub or of GLUE is called the same by everyone who downloads it, so its folder needs no settings.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import TaskConfig
from ..errors import DataError
from .textfile import read_jsonl, read_lines

Row = dict[str, Any]
Rows = list[Row]

SUFFIXES = (".tsv", ".jsonl", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Source:
    """How a task's rows are found, and what its recipe section defaults to."""

    read: Callable[[TaskConfig], tuple[Rows, Rows]]
    """Training rows and evaluation rows."""
    groups: Callable[[Sequence[Row]], list[tuple[int, ...]]]
    """The groups that each row belongs to; related rows stay on one side of the validation split."""
    template: str = ""
    columns: tuple[str, ...] = ()
    """What an encoder reads: one column, or two."""
    labels: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    """What the data itself calls the labels, in their order."""
    label_column: str = ""
    document_column: str = ""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published data set: its place on the hub, and what its files are called in a folder."""

    hub: tuple[str, str]
    """Name and configuration."""
    split: str
    """The hub's name of the evaluation split."""
    stems: tuple[str, ...]
    """Names of the evaluation file, without suffix; the training file is ``train``."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Name in some published form -> name here."""

    def __call__(self, config: TaskConfig) -> tuple[Rows, Rows]:
        """Training rows and evaluation rows."""
        if config.data_dir:
            folder = Path(config.data_dir)
            found = read_split(folder, ("train",)), read_split(folder, self.stems)
        else:
            found = read_hub(*self.hub, "train"), read_hub(*self.hub, self.split)
        return self._renamed(found[0]), self._renamed(found[1])

    def _renamed(self, rows: Rows) -> Rows:
        return [{self.columns.get(key, key): value for key, value in row.items()} for row in rows]


def read_split(folder: Path, stems: Sequence[str]) -> Rows:
    """The rows of one split: ``STEM.tsv``, ``.jsonl`` or ``.parquet``, or the hub's numbered parquet files.

    Raises:
        DataError: there is no such file, there are several, or it cannot be read or is empty.
    """
    names = [f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES]
    found = [folder / name for name in names if (folder / name).is_file()]
    parts = sorted(path for stem in stems for path in folder.glob(f"{stem}-*-of-*.parquet"))
    if len(found) + bool(parts) > 1:
        listed = ", ".join(path.name for path in (*found, *parts))
        raise DataError(f"{folder}: {listed} hold the same rows; leave one of them in task.data_dir")
    if parts:
        return [row for path in parts for row in _read_parquet(path)]
    if not found:
        raise DataError(f"{folder}: no {', '.join(names)} or parquet parts there; check task.data_dir")
    readers = {".tsv": _read_tsv, ".jsonl": read_jsonl_rows, ".parquet": _read_parquet}
    return readers[found[0].suffix](found[0])


def _read_tsv(path: Path) -> Rows:
    # GLUE files are not CSV: a quotation mark is text.
    rows = csv.DictReader(read_lines(path, "task.data_dir"), delimiter="\t", quoting=csv.QUOTE_NONE)
    return _not_empty(list(rows), path)


def read_jsonl_rows(path: Path) -> Rows:
    """The rows of a JSONL file.

    Raises:
        DataError: it cannot be read, is not JSONL, or is empty.
    """
    return _not_empty([row for _, row in read_jsonl(path, "task.data_dir")], path)


def _read_parquet(path: Path) -> Rows:
    import pyarrow.parquet as parquet

    try:
        rows = parquet.ParquetFile(path).read().to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error}); download it again") from error
    return _not_empty(rows, path)


def _not_empty(rows: Rows, path: Path) -> Rows:
    if not rows:
        raise DataError(f"{path}: no rows; the data set is empty")
    return rows


def read_hub(name: str, subset: str, split: str) -> Rows:
    """The rows of one split of a hub data set.

    Raises:
        DataError: the hub gives nothing.
    """
    import datasets

    try:
        return list(datasets.load_dataset(name, subset, split=split))
    except Exception as error:  # datasets raises many unrelated types for "not there" and "no network"
        raise DataError(
            f"the hub gave no data for {name}/{subset} ({error}); "
            "download it and set task.data_dir to its folder"
        ) from error


def one_by_one(rows: Sequence[Row]) -> list[tuple[int, ...]]:
    """Every row is a group of its own."""
    return [(index,) for index in range(len(rows))]


def sharing(*columns: str) -> Callable[[Sequence[Row]], list[tuple[int, ...]]]:
    """Rows with the same text in one of ``columns`` are one group, and so are rows linked through others."""

    def groups(rows: Sequence[Row]) -> list[tuple[int, ...]]:
        parents = list(range(len(rows)))

        def root(index: int) -> int:
            while parents[index] != index:
                parents[index] = parents[parents[index]]
                index = parents[index]
            return index

        first: dict[tuple[str, str], int] = {}
        for index, row in enumerate(rows):
            for column in columns:
                other = first.setdefault((column, str(row.get(column)).strip()), index)
                parents[root(index)] = root(other)
        return [(root(index),) for index in range(len(rows))]

    return groups
