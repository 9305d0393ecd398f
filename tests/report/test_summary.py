"""The paragraph at the top of the report, and numbers in words, for constructed results."""

import json
from pathlib import Path
from typing import Any

import pytest

from bitdistill.report.collect import collect
from bitdistill.report.summary import summary
from bitdistill.report.words import duration, human_bytes


def row_of(label: str, accuracy: float, size: int = 15_000_000) -> dict[str, Any]:
    """One method row of result.json."""
    return {"label": label, "accuracy": accuracy, "stderr": 0.004, "bytes": size}


def summary_of(tmp_path: Path, rows: dict[str, Any], majority: float | None = 0.509) -> str:
    """The paragraph of a run with these rows."""
    meta = {"task": "sst2", "eval_items": 872, "majority_accuracy": majority}
    (tmp_path / "result.json").write_text(json.dumps({"meta": meta} | rows))
    return summary(collect(tmp_path))


def four(fp16: float, ct: float, bitnet: float, bitdistill: float) -> dict[str, dict[str, Any]]:
    """The four methods with these accuracies."""
    return {
        "fp16_sft": row_of("FP16-SFT", fp16),
        "fp16_ct_sft": row_of("FP16-CT-SFT", ct),
        "bitnet_sft": row_of("BitNet-SFT", bitnet, 6_000_000),
        "bitdistill": row_of("BitDistill", bitdistill, 6_000_000),
    }


def test_summary_of_a_wide_gap(tmp_path: Path) -> None:
    assert summary_of(tmp_path, four(0.90, 0.92, 0.82, 0.90)) == (
        "On sst2 (872 evaluation items), BitDistill reaches 90.0% accuracy, 2.0 points below "
        "FP16-CT-SFT (92.0%), the better full-precision row. It is 8.0 points above BitNet-SFT (82.0%), "
        "the direct ternary fine-tune. It closes 80% of the 10.0 points between BitNet-SFT and "
        "FP16-CT-SFT. Packed, embeddings included, the student takes 6.00 MB against 15.0 MB for "
        "FP16-CT-SFT: 2.5 times smaller."
    )


def test_summary_of_a_small_gap(tmp_path: Path) -> None:
    text = summary_of(tmp_path, four(0.92, 0.90, 0.89, 0.915))
    assert "0.5 points below FP16-SFT (92.0%), the better full-precision row, and within two standard" in text
    assert (
        "BitNet-SFT is only 3.0 points below FP16-SFT: the gap is too small to speak of gap closure." in text
    )
    assert "It closes" not in text


def test_summary_of_an_uninformative_run(tmp_path: Path) -> None:
    text = summary_of(tmp_path, four(0.90, 0.92, 0.87, 0.86), 0.88)
    assert "It is 1.0 points below BitNet-SFT (87.0%)" in text
    assert "It closes none of the 5.0 points" in text
    assert text.endswith(
        "FP16-CT-SFT itself is only 4.0 points above always answering the majority class (88.0%), "
        "so this comparison is uninformative."
    )


def test_summary_of_an_incomplete_run(tmp_path: Path) -> None:
    rows = four(0.90, 0.92, 0.92, 0.92)
    text = summary_of(tmp_path, {key: rows[key] for key in ("fp16_sft", "bitnet_sft")})
    assert text == (
        "This run has no BitDistill row; the table shows what was measured. "
        "BitNet-SFT is not below FP16-SFT, so there is no gap to close."
    )
    alone = summary_of(tmp_path, {"bitdistill": rows["bitdistill"]})
    assert alone.endswith("92.0% accuracy; there is no full-precision row to hold it against.")


@pytest.mark.parametrize(("bitnet", "speaks"), [(0.91, True), (0.9101, False)])
def test_gap_of_exactly_four_points_counts(tmp_path: Path, bitnet: float, speaks: bool) -> None:
    """100 * (0.95 - 0.91) is 3.9999999999999925 in floating point."""
    text = summary_of(tmp_path, four(0.95, 0.90, bitnet, 0.94))
    assert ("It closes 75% of the 4.0 points" in text) == speaks


@pytest.mark.parametrize(("majority", "warns"), [(0.90, False), (0.901, True), (0.96, True), (None, False)])
def test_uninformative_below_five_points(tmp_path: Path, majority: float | None, warns: bool) -> None:
    assert ("uninformative" in summary_of(tmp_path, four(0.95, 0.90, 0.85, 0.94), majority)) == warns


def test_generation_task_without_errors(tmp_path: Path) -> None:
    row = {"label": "BitDistill", "exact_match": 0.5, "bytes": 30}
    rows = {"bitdistill": row, "fp16_sft": row | {"label": "FP16-SFT", "bytes": 15}}
    text = summary_of(tmp_path, rows, None)
    assert "reaches 50.0% exact match, level with FP16-SFT (50.0%), the full-precision row." in text
    assert text.endswith("2.0 times larger.")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (123_456, "123 kB"),
        (999_600, "1.00 MB"),
        (15_000_000, "15.0 MB"),
        (99_960_000, "100 MB"),
        (2_500_000_000, "2.50 GB"),
        (5e12, "5000 GB"),
    ],
)
def test_human_bytes(size: float, text: str) -> None:
    assert human_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (3599.6, "1 h 00 min"),
        (7260, "2 h 01 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
