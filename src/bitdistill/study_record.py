"""The record of one finished run of a study: everything that its tables and plots need, in one JSON file.

Rows keep their items one by one, so that any two rows on the same items can be compared in pairs; training curves are
averaged down to CURVE_POINTS. Numbers in rows of a kind are one line of text, so that a record stays readable.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import checkpoint_digest, provenance, read_run
from .config import Recipe
from .errors import CheckpointError
from .metrics import Evaluation
from .recipe import to_dict
from .report.study.reading import FORMAT
from .train.loading import load_model

CURVE_POINTS = 40
CURVES = (
    "loss",
    "loss/ce",
    "loss/logits_kd_weighted",
    "loss/relation_kd_weighted",
    "quant/flip_rate",
    "quant/zero_frac",
)
"""What of ``metrics.jsonl`` a record keeps."""


def study_record(
    recipe: Recipe,
    result: Mapping[str, Any],
    *,
    study: str,
    title: str,
    point: Mapping[str, Any],
    reference: bool,
) -> dict[str, Any]:
    """The record of a finished run.

    Args:
        result: what ``pipeline.run`` returned.
        study: name of the study, the folder of its records.
        title: its question, for people.
        point: dotted recipe keys that the study varies, with the values of this run.
        reference: the run that others of the study are held against.
    """
    meta = result["meta"]
    rows = {key: row for key, row in result.items() if key != "meta"}
    names = dict.fromkeys(name for row in rows.values() for name in row["steps"])
    return {
        "format": FORMAT,
        "study": study,
        "title": title,
        "point": dict(point),
        "reference": reference,
        "seed": recipe.seed,
        "task": meta["task"],
        "preset": recipe.distill.preset,
        "base": base_facts(recipe),
        "judged_on": meta["judged_on"],
        "metric": meta["metric"],
        "num_items": meta["eval_items"],
        "items_digest": meta["items_digest"],
        "meta": meta,
        "rows": {key: row | _items(recipe, row, meta["judged_on"]) for key, row in rows.items()},
        "steps": {name: step_record(recipe.run_dir / name) for name in names},
    }


def failure_record(
    recipe: Recipe, reason: str, *, study: str, title: str, point: Mapping[str, Any], reference: bool
) -> dict[str, Any]:
    """The record of a run that training ended, which is a result too; it has no rows."""
    return {
        "format": FORMAT,
        "study": study,
        "title": title,
        "point": dict(point),
        "reference": reference,
        "seed": recipe.seed,
        "task": recipe.task.name,
        "preset": recipe.distill.preset,
        "base": base_facts(recipe),
        "judged_on": recipe.run.judged_on,
        "failed": reason,
        "meta": {"recipe": to_dict(recipe), **provenance()},
        "rows": {},
        "steps": {},
    }


def read_record(path: Path) -> dict[str, Any]:
    """A record that is there.

    Raises:
        CheckpointError: it is damaged, or of another format.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        known = record["format"] == FORMAT and isinstance(record["meta"]["recipe"]["run"], dict)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not the record of a run ({error}); delete it to run its point again"
        ) from error
    if not known:
        raise CheckpointError(
            f"{path}: a record of format {record['format']!r}, and this version writes {FORMAT}"
        )
    return dict(record)


def base_facts(recipe: Recipe) -> dict[str, Any]:
    """The full-precision model of a recipe: where it is, its digest and its sizes."""
    source = str(recipe.run_dir / "base") if recipe.base is not None else recipe.model.source
    revision = recipe.revision_of(source)
    model = load_model(source, revision)
    tables = {
        id(layer.weight): layer.weight
        for layer in (model.get_input_embeddings(), model.get_output_embeddings())
        if layer
    }
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "source": source,
        "digest": checkpoint_digest(source, revision),
        "parameters": parameters,
        "non_embedding_parameters": parameters - sum(table.numel() for table in tables.values()),
    }


def _items(recipe: Recipe, row: Mapping[str, Any], split: str) -> dict[str, str]:
    path = recipe.run_dir / row["steps"][-1] / f"eval-{split}.json"
    items = Evaluation.from_dict(json.loads(path.read_text(encoding="utf-8"))).items
    if set(items) <= {0.0, 1.0}:
        return {"items_hex": np.packbits(np.asarray(items, dtype=bool)).tobytes().hex()}
    return {"items": " ".join(f"{item:g}" for item in items)}


def step_record(folder: Path) -> dict[str, Any]:
    """What is kept of a finished step: its metrics, its curves and the picture of its weights."""
    run = read_run(folder)
    record: dict[str, Any] = {
        "stage": run["settings"]["stage"],
        "settings": run["settings"],
        "time_s": run["time_s"],
        "metrics": run["metrics"],
    }
    log = folder / "metrics.jsonl"
    if log.is_file():
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        record["curves"] = {key: curve for key in CURVES if (curve := _curve(lines, key))}
    weights = folder / "weights.json"
    if weights.is_file():
        found = json.loads(weights.read_text(encoding="utf-8"))
        edges, counts = found.pop("edges"), found.pop("counts")
        bins = {"low": edges[0], "high": edges[-1], "counts": " ".join(map(str, counts))}
        record["weights"] = bins | found
    return record


def _curve(lines: Sequence[Mapping[str, float]], key: str) -> dict[str, str]:
    """Means over runs of neighbouring lines, each at the last of its steps; empty if no line has the key."""
    found = [(line["step"], line[key]) for line in lines if key in line]
    parts = np.array_split(np.asarray(found, dtype=float), min(len(found), CURVE_POINTS)) if found else []
    if not parts:
        return {}
    return {
        "step": " ".join(f"{part[-1, 0]:.0f}" for part in parts),
        "value": " ".join(f"{part[:, 1].mean():.5g}" for part in parts),
    }
