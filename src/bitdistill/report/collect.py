"""Read a run folder into records. Only ``result.json`` is needed; every other file may be missing.

An optional file that is damaged is left out and named in ``RunReport.notes``, so that one cut file
does not cost the whole report.
"""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..checkpoint import RUN_FILE
from ..errors import CheckpointError
from .records import Method, RunReport, StepRecord, Weights, clean, number
from .words import is_base, metric_name

RESULT_FILE = "result.json"
BASE_STEP = "base"
"""Folder of the base made from scratch, which comes before the first step of every method."""


def collect(run_dir: Path) -> RunReport:
    """Read a run folder.

    Raises:
        CheckpointError: there is no ``result.json``, or it is damaged.
    """
    path = Path(run_dir) / RESULT_FILE
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: no such file; give the folder of a `bitdistill run`, or finish the run first"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"not JSON: {error}") from error
    if not isinstance(result, dict) or not isinstance(result.get("meta"), dict):
        raise _damaged(path, 'it has no "meta" object')
    meta = result["meta"]
    rows = {key: row for key, row in result.items() if key != "meta"}
    if not rows:
        raise _damaged(path, "it has no method row")
    metric = _metric(meta, rows)
    try:
        methods = [method_row(key, row, metric) for key, row in rows.items()]
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    notes: list[str] = []
    return RunReport(
        name=clean(meta.get("name") or Path(run_dir).resolve().name),
        meta=meta,
        metric=metric_name(metric),
        metric_key=metric,
        baselines=_baselines(meta.get("baselines")),
        methods=methods,
        steps=_steps(Path(run_dir), methods, notes),
        notes=notes,
    )


def collect_pretraining(run_dir: Path) -> tuple[list[StepRecord], list[str]]:
    """Models pre-trained from scratch directly in a run folder, finished or not, by name; and what was damaged."""
    notes: list[str] = []
    files = _Files(run_dir, notes)
    names = sorted(path.parent.name for path in run_dir.glob(f"*/{RUN_FILE}"))
    steps = [_step(files, name, None, (), None) for name in names]
    return [step for step in steps if is_base(step) and step.log], notes


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: damaged ({what}); run the recipe again, finished steps are reused")


def _metric(meta: dict[str, Any], rows: dict[str, Any]) -> str:
    """The metric of a run; older results do not name it."""
    named = meta.get("metric")
    if isinstance(named, str) and named:
        return clean(named)
    found = any(isinstance(row, dict) and "exact_match" in row for row in rows.values())
    return "exact_match" if found else "accuracy"


def _baselines(values: object) -> dict[str, dict[str, float]]:
    found = values.items() if isinstance(values, dict) else ()
    return {clean(name): _numbers(scores) for name, scores in found if isinstance(scores, dict)}


def method_row(key: str, row: object, metric: str) -> Method:
    """A row as ``result.json`` and a study's records hold it.

    Raises:
        ValueError: it has another shape.
    """
    if not isinstance(row, dict):
        raise ValueError(f'"{clean(key)}" is not an object')
    score = row.get(metric)
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
        raise ValueError(f'the score of "{clean(key)}" is {clean(score)!r}, not a number')
    steps, times, grid = row.get("steps") or [], row.get("time_s") or {}, row.get("grid") or {}
    if not (isinstance(steps, list) and isinstance(times, dict) and isinstance(grid, dict)):
        raise ValueError(f'"steps", "time_s" or "grid" of "{clean(key)}" has another shape than expected')
    return Method(
        key=clean(key),
        label=clean(row.get("label") or key),
        score=number(score),
        stderr=number(row.get("stderr")),
        size_bytes=number(row.get("bytes")),
        parameters=number(row.get("parameters")),
        learning_rate=number(row.get("learning_rate")),
        validation=number(row.get(f"validation_{metric}")),
        steps=tuple(clean(step) for step in steps),
        time_s=_numbers(times),
        grid=_numbers(grid),
        others=_others(row.get("metrics")),
    )


def _others(values: object) -> dict[str, tuple[float, float | None]]:
    found = {}
    for key, score in values.items() if isinstance(values, dict) else ():
        value = number(score.get("value")) if isinstance(score, dict) else None
        if value is not None:
            found[clean(key)] = (value, number(score.get("stderr")))
    return found


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    found = ((clean(key), number(value)) for key, value in values.items())
    return {key: value for key, value in found if value is not None}


@dataclass(frozen=True)
class _Files:
    """Optional files of the run folder, and what was wrong with them."""

    run_dir: Path
    notes: list[str]

    def text(self, name: str) -> str:
        """A file's text; empty if there is none."""
        try:
            return (self.run_dir / name).read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return ""
        except (OSError, ValueError) as error:
            self.notes.append(clean(f"{name} cannot be read ({error}) and was left out."))
            return ""

    def json_object(self, name: str) -> dict[str, Any]:
        """A JSON object; empty if there is none."""
        text = self.text(name)
        if not text:
            return {}
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            return value
        self.is_damaged(name)
        return {}

    def is_damaged(self, name: str) -> None:
        """Tell the reader that a file was left out."""
        self.notes.append(clean(f"{name} is damaged and was left out."))


def _steps(run_dir: Path, methods: list[Method], notes: list[str]) -> list[StepRecord]:
    """Every step once, in the order in which the methods first name it, after the base if any."""
    files = _Files(run_dir, notes)
    has_base = (run_dir / BASE_STEP / RUN_FILE).is_file()
    parents: dict[str, str | None] = {BASE_STEP: None} if has_base else {}
    users: dict[str, list[str]] = {path: [m.label for m in methods] for path in parents}
    for method in methods:
        parent = BASE_STEP if has_base else None
        for path in method.steps:
            parents.setdefault(path, parent)
            labels = users.setdefault(path, [])
            if method.label not in labels:
                labels.append(method.label)
            parent = path
    times = {path: seconds for method in methods for path, seconds in method.time_s.items()}
    return [
        _step(files, path, parent, tuple(users[path]), times.get(path)) for path, parent in parents.items()
    ]


def _step(
    files: _Files, path: str, parent: str | None, used_by: tuple[str, ...], time_s: float | None
) -> StepRecord:
    run = files.json_object(f"{path}/{RUN_FILE}")
    settings = run.get("settings")
    stage = settings.get("stage") if isinstance(settings, dict) else None
    return StepRecord(
        path=path,
        parent=parent,
        used_by=used_by,
        stage=clean(stage or ""),
        time_s=time_s if time_s is not None else number(run.get("time_s")),
        run=run,
        log=_log(files.text(f"{path}/metrics.jsonl")),
        weights=_weights(files, f"{path}/weights.json"),
        surgery=clean(files.text(f"{path}/surgery.txt")).strip(),
    )


def _log(text: str) -> list[dict[str, float]]:
    lines = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # a line that a kill cut short
            continue
        if isinstance(record, dict):
            lines.append(_numbers(record))
    return lines


def _weights(files: _Files, name: str) -> Weights | None:
    value = files.json_object(name)
    if not value:
        return None
    found = weights_of(value, _list(value.get("edges")), _list(value.get("counts")))
    if found is None:
        files.is_damaged(name)
    return found


def weights_of(value: dict[str, Any], edges: list[float], counts: list[float]) -> Weights | None:
    """A histogram with the shares beside it; None if edges and counts do not make one."""
    rises = all(left < right for left, right in pairwise(edges))
    if not (rises and len(edges) == len(counts) + 1 and min(counts, default=-1) >= 0 and sum(counts) > 0):
        return None
    return Weights(
        edges=edges,
        counts=counts,
        minus_frac=number(value.get("minus_frac")),
        zero_frac=number(value.get("zero_frac")),
        plus_frac=number(value.get("plus_frac")),
        near_threshold_frac=number(value.get("near_threshold_frac")),
        flip_rate=number(value.get("flip_rate")),
    )


def _list(values: object) -> list[float]:
    """A JSON list of finite numbers; empty if it is anything else."""
    found = [number(value) for value in values] if isinstance(values, list) else []
    known = [value for value in found if value is not None]
    return known if len(known) == len(found) else []
