"""``bitdistill sweep``: a recipe at every point of a grid and every seed, each a whole ``run`` with its own record.

Steps that points share are made once (``steps_dir``). A point that has its record is not run again, so a killed sweep
continues where it was; several processes that run the same sweep take different points.
"""

import dataclasses
import itertools
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from . import pipeline
from .checkpoint import digest_of, write_json
from .config import Recipe
from .errors import CheckpointError, TrainingError
from .locks import locked
from .processes import from_main_process, num_processes, on_main_process
from .recipe import build_recipe, to_dict
from .study_record import failure_record, read_record, study_record

logger = logging.getLogger(__name__)

LONGEST_NAME = 100
"""Characters of a point's name; a longer one ends in a digest."""
SECONDS_BETWEEN_LOOKS = 2.0
"""How often a sweep that waits for other processes looks for a run that one of them ended or left."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    values: Mapping[str, Any]
    """Dotted recipe keys that the sweep varies."""
    seed: int
    reference: bool
    """Whether it is the point that the others are held against: the first value of every key."""
    with_sections: bool = False
    """Whether the name has the keys' sections too, because it would be another point's name without them."""

    @property
    def name(self) -> str:
        """What tells it from the other points of its sweep."""
        names = [key if self.with_sections else key.rpartition(".")[2] for key in self.values]
        parts = [f"{key}-{_slug(value)}" for key, value in zip(names, self.values.values(), strict=True)]
        text = "_".join(parts) or "as-it-is"
        if len(text) > LONGEST_NAME:
            text = f"{text[:LONGEST_NAME]}-{digest_of(dict(self.values))[:6]}"
        return f"{text}_s{self.seed}"


def _slug(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text.rsplit("/", 1)[-1]).strip("-") or "none"


def points(
    grid: Mapping[str, Sequence[Any]], choices: Sequence[Mapping[str, Any]], seeds: Sequence[int]
) -> list[Point]:
    """All points, those of the first seed first.

    Args:
        grid: values of every key; all combinations are taken.
        choices: sets of values that go together, each of which is combined with the whole grid; none: the grid alone.
        seeds: seeds of the recipe.
    """
    combinations = [
        dict(choice) | dict(zip(grid, values, strict=True))
        for choice in choices or [{}]
        for values in itertools.product(*grid.values())
    ]
    found = [Point(values, seed, index == 0) for seed in seeds for index, values in enumerate(combinations)]
    taken = Counter(point.name for point in found)
    return [dataclasses.replace(point, with_sections=taken[point.name] > 1) for point in found]


def point_recipe(recipe: Recipe, point: Point, folder: Path) -> Recipe:
    """The recipe of a point, as a run in ``folder``; its name, and its record's, begin with task and base."""
    source = Path(recipe.model.source).name or "base"
    return dataclasses.replace(
        recipe,
        name=f"{recipe.task.name}_{source}_{point.name}",
        output_dir=str(folder),
        seed=point.seed,
        steps_dir=recipe.steps_dir or str(folder / "steps"),
    )


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The runs of a study and where their records go."""

    study: str
    """Its name, and the folder of its records."""
    title: str
    """Its question, for people."""
    runs: Sequence[tuple[Point, Recipe]]
    """Every point with its recipe, see ``point_recipe``; the first seed's come first."""
    records: Path
    """Folder of the records of all studies."""
    tune_once: bool = False
    """The learning rates that a grid chose at the first seed serve the other seeds."""

    def path(self, recipe: Recipe) -> Path:
        """The record of a run."""
        return self.records / self.study / f"{recipe.name}.json"

    def run(self) -> dict[str, dict[str, Any]]:
        """Run every point that has no record yet; returns all records by the runs' names.

        Raises:
            CheckpointError: a record was made with another recipe.
        """
        on_main_process(self._check_records)
        found: dict[str, dict[str, Any]] = {}
        waiting = False
        while len(found) < len(self.runs):
            before = len(found)
            for number, (point, recipe) in enumerate(self.runs, start=1):
                if recipe.name in found or not self._is_ready(point):
                    continue
                lock = Path(recipe.output_dir) / f"{recipe.name}.lock"
                with ExitStack() as held:
                    if from_main_process(lambda: held.enter_context(locked(lock, wait=False))):  # noqa: B023
                        logger.info("%s, run %d of %d: %s", self.study, number, len(self.runs), recipe.name)
                        found[recipe.name] = self._record(point, recipe)
            if len(found) == before:  # others have begun what is left, or choose its learning rates
                if not waiting:
                    logger.info("%s: waiting for runs that other processes have begun", self.study)
                waiting = True
                time.sleep(SECONDS_BETWEEN_LOOKS)
        return found

    def _check_records(self) -> None:
        for _, recipe in self.runs:
            path = self.path(recipe)
            if not path.is_file():
                continue
            changed = changes(read_record(path)["meta"]["recipe"], to_dict(recipe))
            if changed:
                raise CheckpointError(
                    f"{path} is the record of another recipe ({'; '.join(changed)}). Nothing was changed. Give the "
                    "sweep another --name, or delete that record to run the point again"
                )

    def _is_ready(self, point: Point) -> bool:
        """Whether the first seed has chosen the learning rates that this one takes."""
        first = self._first(point)
        return first is None or from_main_process(first.is_file)

    def _first(self, point: Point) -> Path | None:
        """The record that chooses the learning rates of a point; None where it tries the grid itself."""
        first, recipe = next((p, r) for p, r in self.runs if p.values == point.values)
        return self.path(recipe) if self.tune_once and first is not point else None

    def _record(self, point: Point, recipe: Recipe) -> dict[str, Any]:
        path = self.path(recipe)
        if from_main_process(path.is_file):
            return from_main_process(lambda: read_record(path))
        first = self._first(point)
        if first is not None:
            rates = from_main_process(lambda: chosen_rates(read_record(first)))
            recipe = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, method_rates=rates))
        about: dict[str, Any] = {
            "study": self.study,
            "title": self.title,
            "point": point.values,
            "reference": point.reference,
        }
        try:
            result = pipeline.run(recipe)
        except TrainingError as error:
            if num_processes() > 1:  # the others may still be training
                raise
            logger.warning("%s failed, which is a result: %s", recipe.name, error)
            record = failure_record(recipe, str(error), **about)
        else:
            record = study_record(recipe, result, **about)
        on_main_process(lambda: write_json(path, record))
        return record


def chosen_rates(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The learning rate of every row of a record, as ``run.method_rates`` takes them; none where the run failed."""
    return tuple(f"{key}={row['learning_rate']:g}" for key, row in record["rows"].items())


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What decides a run's result and differs between two recipes, as ``to_dict`` gives them.

    Not where its files are, nor rates that another run chose. A key that the earlier one does not know yet counts
    where it is not at its default; one that there is no more says nothing.
    """
    defaults = _flat(to_dict(build_recipe({"name": "any"})))
    old, new = _flat(before), _flat(now)
    where = ("name", "output_dir", "steps_dir", "run.method_rates")
    keys = [key for key in new if key not in where and old.get(key, defaults.get(key)) != new[key]]
    return [f"{key}: {old.get(key, 'not known')!r} there, {new[key]!r} now" for key in sorted(keys)]


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        flat |= {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat
