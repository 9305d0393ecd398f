"""The report of a run folder in which models were pre-trained: expected cells and points are written here by hand."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from test_report import EDGES, charts_of, html_tables, markdown_tables, tree_of

from bitdistill.errors import CheckpointError
from bitdistill.report.pretraining import comparison_charts, curves_table
from bitdistill.report.records import StepRecord
from bitdistill.report.write import write_report

pytest.importorskip("matplotlib")


def write_base(folder: Path, *, heldout: float, ternary: bool, lr: float = 0.004, done: bool = True) -> None:
    """A pre-trained model of ten steps."""
    folder.mkdir(parents=True)
    training = {"ternary": ternary, "learning_rate": lr, "schedule": "two_stage", "tokens": 10240}
    settings = {"stage": "stage2_pretrain", "part": "base", "source": "0123abcd", "training": training}
    record: dict[str, Any] = {"status": "running", "settings": settings}
    if done:
        record |= {"status": "done", "metrics": {"steps": 10}, "time_s": 75}
    (folder / "run.json").write_text(json.dumps(record))
    lines = [
        {"step": 1, "loss": 8.0, "loss/ce": 8.0, "optim/lr": lr},
        {"step": 5, "loss": 4.0, "loss/ce": 4.0, "optim/lr": lr / 2, "heldout/loss": heldout + 1},
        {"step": 10, "loss": 2.5, "loss/ce": 2.5, "optim/lr": lr / 9, "heldout/loss": heldout},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    weights = {
        "edges": EDGES,
        "counts": [1, 2, 2, 1],
        "minus_frac": 0.25,
        "zero_frac": 0.45,
        "plus_frac": 0.3,
    }
    (folder / "weights.json").write_text(
        json.dumps(weights | {"near_threshold_frac": 0.06, "flip_rate": 0.2})
    )


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Twins, one that is still training, the untrained model, and a fine-tune that is no base."""
    write_base(tmp_path / "native", heldout=3.0, ternary=True)
    write_base(tmp_path / "dense", heldout=2.9, ternary=False, lr=0.002)
    write_base(tmp_path / "later.partial", heldout=5.0, ternary=True, done=False)
    for name, settings in (("base-blank", {"stage": "base"}), ("tuned", {"stage": "sft"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"settings": settings}))
    return tmp_path


def test_the_table_says_what_every_model_was_and_where_it_ended(run_dir: Path) -> None:
    html, markdown = write_report(run_dir)
    rows = html_tables(tree_of(html))["Pre-trained from scratch"]
    assert rows[0][:4] == ["Model", "Linears", "Same start", "Schedule"]
    common = ["0123abcd", "two_stage"]
    assert rows[1:] == [
        [
            "dense",
            "full precision",
            *common,
            "0.002",
            "10,240",
            "10",
            "2.5000",
            "2.9000",
            "18.17",
            "1 min 15 s",
        ],
        [
            "later.partial",
            "ternary",
            *common,
            "0.004",
            "10,240",
            "10",
            "2.5000",
            "5.0000",
            "148.41",
            "not recorded",
        ],
        ["native", "ternary", *common, "0.004", "10,240", "10", "2.5000", "3.0000", "20.09", "1 min 15 s"],
    ]
    text = markdown.read_text(encoding="utf-8")
    assert markdown_tables(text)["Pre-trained from scratch"] == rows
    assert "base-blank" not in text
    assert "tuned" not in text


def test_curves_stand_side_by_side_and_the_drop_is_marked(run_dir: Path) -> None:
    html, _ = write_report(run_dir)
    page = tree_of(html)
    shared = charts_of(next(iter(page.iter("div"))))
    assert shared == [
        "Training loss, nats; dashed: the learning rate drops",
        "Held-out perplexity (log scale); dashed: the learning rate drops",
        "Learning rate",
    ]
    text = " ".join(page.itertext())
    for label in ("dense, full precision", "native, ternary"):
        assert text.count(label) == 3


def test_the_perplexity_that_is_drawn_is_exp_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitdistill.report import pretraining

    drawn = {}

    def record(owner: str, title: str, curves: dict, **options: Any) -> str:
        drawn[title.partition(" (")[0].partition(",")[0]] = (curves, options)
        return title

    monkeypatch.setattr(pretraining, "compare", record)
    log = [{"step": 6.0, "loss": 3.0, "heldout/loss": 2.0, "optim/lr": 1e-3}]
    run = {
        "settings": {"training": {"ternary": True, "schedule": "two_stage_cosine"}},
        "metrics": {"steps": 11},
    }
    step = StepRecord(
        path="a", parent=None, used_by=(), stage="", time_s=None, run=run, log=log, weights=None, surgery=""
    )
    comparison_charts([step])
    curves, options = drawn["Held-out perplexity"]
    assert curves == {"a, ternary": ([6.0], [pytest.approx(math.exp(2.0))])}
    # 11 steps: the seventh, whose index is 6, is the first in the second half.
    assert options == {"is_log": True, "marks": [7.0]}
    assert drawn["Training loss"][0] == {"a, ternary": ([6.0], [3.0])}


def test_a_run_that_recorded_less_is_shown_as_far_as_it_goes() -> None:
    step = StepRecord(
        path="a",
        parent=None,
        used_by=(),
        stage="",
        time_s=None,
        run={},
        log=[{"step": 1.0}],
        weights=None,
        surgery="",
    )
    assert curves_table([step]).rows == [("a", *["not recorded"] * 5, "1", *["not recorded"] * 4)]
    assert comparison_charts([step]) == []


def test_a_run_with_a_result_keeps_its_own_report_and_an_empty_folder_is_refused(run_dir: Path) -> None:
    row = {"label": "BitDistill", "accuracy": 0.5}
    (run_dir / "result.json").write_text(json.dumps({"meta": {}, "bitdistill": row}))
    assert "Pre-trained from scratch" not in write_report(run_dir)[0].read_text(encoding="utf-8")
    with pytest.raises(
        CheckpointError, match=re.escape("no such file; give the folder of a `bitdistill run`")
    ):
        write_report(run_dir / "tuned")
