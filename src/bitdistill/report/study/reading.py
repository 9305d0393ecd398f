"""Read the records of a folder of studies. A file that cannot be used is named in a note, and the others are read."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from ...checkpoint import digest_of
from ...errors import CheckpointError
from ..collect import method_row, weights_of
from ..records import StepRecord, Weights, clean, number
from .records import Base, Items, StudyRecord

FORMAT = 1
"""Of the records that this version writes and reads."""
PATTERNS = ("records/*/*.json", "*/*.json")
"""Where records lie, a folder for each study: below ``records`` in the folder of a sweep, or right in the folder."""
SCORE_TOLERANCE = 1e-5
"""Items that are not all 0 or 1 are written with six digits."""


def read_study(folder: Path) -> tuple[list[StudyRecord], list[str]]:
    """All usable records of a folder, by file name, and what was wrong with the other files.

    Raises:
        CheckpointError: a record has a format that this version does not know.
    """
    records: dict[tuple[Any, ...], StudyRecord] = {}
    notes = []
    for path in next((found for pattern in PATTERNS if (found := sorted(folder.glob(pattern)))), []):
        name = clean(path.relative_to(folder))
        try:
            record = _read(path, name)
        except CheckpointError:  # an OSError too
            raise
        except (OSError, ValueError, RecursionError) as error:
            notes.append(clean(f"{name} is damaged ({error}) and was left out."))
            continue
        if record is None:
            notes.append(f"{name} is no record of a run and was left out.")
            continue
        key = (record.study, record.task, record.base.identity, record.judged_on, record.seed)
        first = records.setdefault((*key, digest_of(record.point)), record)
        if first is not record:
            notes.append(f"{name} is the same point and seed as {first.path} and was left out.")
    return list(records.values()), notes


def _read(path: Path, name: str) -> StudyRecord | None:
    """The record of a file; None if the file is something else.

    Raises:
        ValueError: it is damaged; the message says where.
        CheckpointError: its format is unknown.
    """
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict) or not {"format", "study", "rows"} <= value.keys():
        return None
    if value["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: a record of format {clean(value['format'])!r}, and this version of bitdistill reads {FORMAT}; "
            "report it with the version that wrote it (meta.versions in the file), or move it out of the folder"
        )
    failed = clean(value.get("failed") or "")
    meta = _field(value, "meta", dict)
    num_items = 0 if failed else _field(value, "num_items", int)
    metric = "" if failed else clean(_field(value, "metric", str))
    rows = _field(value, "rows", dict)
    if not (rows or failed):
        raise ValueError('"rows" is empty')
    seed = _field(value, "seed", int)
    if seed < 0 or num_items < (not failed):
        raise ValueError(f"seed {seed} or num_items {num_items} is too small")
    methods = {clean(key): method_row(key, row, metric) for key, row in rows.items()}
    items = {clean(key): _items(key, row, num_items) for key, row in rows.items()}
    for key, method in methods.items():
        if method.score is None or abs(float(items[key].mean()) - method.score) > SCORE_TOLERANCE:
            raise ValueError(f'the score of "{key}" is not the mean of its items')
    return StudyRecord(
        path=name,
        study=clean(_field(value, "study", str)),
        title=clean(value.get("title") or value["study"]),
        point=_field(value, "point", dict),
        is_reference=value.get("reference") is True,
        seed=seed,
        task=clean(_field(value, "task", str)),
        preset=clean(value.get("preset") or ""),
        base=_base(_field(value, "base", dict), meta),
        judged_on=clean(_field(value, "judged_on", str)),
        metric=metric,
        num_items=num_items,
        items_digest="" if failed else clean(_field(value, "items_digest", str)),
        meta=meta,
        methods=methods,
        items=items,
        steps=_steps(_field(value, "steps", dict)),
        failed=failed,
    )


def _field(value: dict[str, Any], key: str, kind: type) -> Any:
    found = value.get(key)
    if not isinstance(found, kind) or isinstance(found, bool):
        raise ValueError(f'"{key}" is missing or of another kind')
    return found


def _base(value: dict[str, Any], meta: dict[str, Any]) -> Base:
    recipe = meta.get("recipe")
    made = recipe.get("base") if isinstance(recipe, dict) else None
    source = str(value.get("source") or "")
    return Base(
        # A base that each seed makes for itself is part of what the seed decides.
        identity=digest_of(made) if made else clean(value.get("digest") or source),
        name=clean(source.rstrip("/").rpartition("/")[2]),
        non_embedding_parameters=number(value.get("non_embedding_parameters")),
    )


def _items(key: str, row: dict[str, Any], num_items: int) -> Items:
    if "items_hex" in row:
        packed = np.frombuffer(bytes.fromhex(_field(row, "items_hex", str)), dtype=np.uint8)
        items: Items = np.unpackbits(packed)[:num_items]
        is_whole = len(packed) == math.ceil(num_items / 8)
    else:
        items = np.array(_field(row, "items", str).split(), dtype=float)
        is_whole = len(items) == num_items and bool(np.isfinite(items).all())
    if not is_whole:
        raise ValueError(f'"{clean(key)}" has not {num_items} items')
    return items


def _steps(steps: dict[str, Any]) -> dict[str, StepRecord]:
    return {clean(name): _step(clean(name), _field(steps, name, dict)) for name in steps}


def _step(name: str, value: dict[str, Any]) -> StepRecord:
    curves = value.get("curves") or {}
    if not isinstance(curves, dict):
        raise ValueError(f'"curves" of "{name}" is no object')
    return StepRecord(
        path=name,
        parent=None,
        used_by=(),
        stage=clean(value.get("stage") or ""),
        time_s=number(value.get("time_s")),
        run={key: value[key] for key in ("settings", "metrics") if isinstance(value.get(key), dict)},
        log=[point for key in curves for point in _curve(name, key, _field(curves, key, dict))],
        weights=_weights(name, value.get("weights")),
        surgery="",
    )


def _curve(step: str, key: str, curve: dict[str, Any]) -> list[dict[str, float]]:
    xs, ys = (_numbers(_field(curve, axis, str)) for axis in ("step", "value"))
    if len(xs) != len(ys):
        raise ValueError(f'"{clean(key)}" of "{step}" has {len(xs)} steps and {len(ys)} values')
    pairs = zip(xs, ys, strict=True)
    return [{"step": x, clean(key): y} for x, y in pairs if math.isfinite(x) and math.isfinite(y)]


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]


def _weights(step: str, value: object) -> Weights | None:
    if not isinstance(value, dict) or not value:
        return None
    low, high = number(value.get("low")), number(value.get("high"))
    counts = _numbers(_field(value, "counts", str))
    if low is None or high is None or not counts:
        raise ValueError(f'"weights" of "{step}" is no histogram')
    edges = [low + (high - low) * index / len(counts) for index in range(len(counts) + 1)]
    found = weights_of(value, edges, counts)
    if found is None:
        raise ValueError(f'"weights" of "{step}" is no histogram')
    return found
