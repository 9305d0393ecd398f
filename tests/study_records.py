"""Records of studies with known numbers, in the shape in which ``bitdistill sweep`` writes them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

LABELS = {
    "fp16_sft": "FP16-SFT",
    "fp16_ct_sft": "FP16-CT-SFT",
    "bitnet_sft": "BitNet-SFT",
    "bitdistill": "BitDistill",
}
STEPS = {
    "fp16_sft": {"fp16_sft/lr-0.002": "sft"},
    "fp16_ct_sft": {"pretrain-fp16": "stage2_pretrain", "fp16_ct_sft/lr-0.002": "sft"},
    "bitnet_sft": {"refine-none": "stage1_refine", "bitnet_sft/lr-0.002": "sft"},
    "bitdistill": {
        "refine-subln": "stage1_refine",
        "pretrain-subln": "stage2_pretrain",
        "bitdistill/lr-0.002": "stage3_distill",
    },
}
SECONDS = {"stage1_refine": 1.0, "stage2_pretrain": 120.0, "sft": 30.0, "stage3_distill": 60.0}


def first_right(right: int, items: int) -> list[float]:
    """Items of which the first ``right`` are right."""
    return [1.0] * right + [0.0] * (items - right)


def row_of(method: str, items: Sequence[float], **more: Any) -> dict[str, Any]:
    """One row of a record; its score is the mean of its items."""
    values = np.asarray(items, dtype=float)
    steps = STEPS[method.partition(":")[0]]
    if set(items) <= {0.0, 1.0}:
        written = {"items_hex": np.packbits(values.astype(bool)).tobytes().hex()}
    else:
        written = {"items": " ".join(f"{item:g}" for item in items)}
    row = {
        "label": LABELS.get(method, method),
        "accuracy": float(values.mean()),
        "stderr": float(values.std() / np.sqrt(len(values))),
        "bytes": 6_000_000,
        "parameters": 3_000_000,
        "learning_rate": 0.002,
        "validation_accuracy": 0.5,
        "steps": list(steps),
        "time_s": {name: SECONDS[stage] for name, stage in steps.items()},
    }
    return row | written | more


def step_of(stage: str, shift: float = 0.0) -> dict[str, Any]:
    """What a record keeps of a step: three points of every curve, four bins."""

    def curve(*values: float) -> dict[str, str]:
        return {"step": "1 10 20", "value": " ".join(f"{value + shift:g}" for value in values)}

    step: dict[str, Any] = {
        "stage": stage,
        "settings": {"stage": stage},
        "metrics": {},
        "time_s": SECONDS[stage],
    }
    if stage != "stage1_refine":
        step["curves"] = {"loss": curve(5, 4, 3), "loss/ce": curve(4.5, 3.5, 2.5)}
        step["curves"]["quant/flip_rate"] = {"step": "10 20", "value": "0.0004 0.0002"}
    if stage == "stage3_distill":
        step["curves"]["loss/logits_kd_weighted"] = curve(0.25, 0.25, 0.25)
        step["curves"]["loss/relation_kd_weighted"] = curve(0.25, 0.25, 0.25)
    shares = {"minus_frac": 0.25, "zero_frac": 0.45, "plus_frac": 0.3, "near_threshold_frac": 0.061}
    step["weights"] = {"low": -1.0, "high": 1.0, "counts": "1 2 2 1"} | shares | {"flip_rate": 0.0456}
    return step


def record_of(rows: Mapping[str, Sequence[float] | Mapping[str, Any]], **more: Any) -> dict[str, Any]:
    """A record of these methods: their items, or whole rows. ``meta`` and ``base`` are added to, the rest replaced."""
    built = {key: dict(row) if isinstance(row, Mapping) else row_of(key, row) for key, row in rows.items()}
    names = {name: stage for key in rows for name, stage in STEPS[key.partition(":")[0]].items()}
    base = {
        "source": "bases/small",
        "digest": "d1",
        "parameters": 3_100_000,
        "non_embedding_parameters": 1_600_000,
    }
    meta = {
        "majority_accuracy": 0.5,
        "machine": "Known CPU",
        "git_revision": "4a7a3781d2aa",
        "versions": {"torch": "2.13.0"},
        "finished": "2026-11-23T09:50:17Z",
        "recipe": {"name": "known", "sft": {"epochs": 2.0}},
    }
    first = next(iter(rows.values()), [])
    num_items = 0 if isinstance(first, Mapping) else len(first)
    record: dict[str, Any] = {
        "format": 1,
        "study": "main",
        "title": "Does it hold?",
        "point": {},
        "reference": True,
        "seed": 0,
        "task": "sst2",
        "preset": "default",
        "judged_on": "test",
        "metric": "accuracy",
        "num_items": num_items,
        "items_digest": f"first {num_items}",
    }
    record |= {key: value for key, value in more.items() if key not in ("meta", "base")}
    record["base"] = base | more.get("base", {})
    record["meta"] = meta | more.get("meta", {})
    return record | {"rows": built, "steps": {name: step_of(stage) for name, stage in names.items()}}


def write_record(folder: Path, record: Mapping[str, Any], name: str = "") -> Path:
    """Write a record where a study's lie; returns its file."""
    number = len(list(folder.glob("*/*.json")))
    path = folder / str(record["study"]) / (name or f"{number:03}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record), encoding="utf-8")
    return path
