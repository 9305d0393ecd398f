"""What may lie in a folder of studies: damaged, foreign and mixed files, and what differs between records."""

import json
from pathlib import Path
from typing import Any

import pytest
from study_records import first_right, record_of, row_of, write_record
from test_pretraining import write_base
from test_report import html_tables, make_known_run, tree_of, words_of

from bitdistill.errors import BitDistillError, CheckpointError
from bitdistill.report.study.cells import studies
from bitdistill.report.study.page import study_tables
from bitdistill.report.study.reading import read_study
from bitdistill.report.study.results import main_entries
from bitdistill.report.write import write_report
from bitdistill.study_record import FORMAT

pytest.importorskip("matplotlib")

ROWS = {
    "fp16_sft": first_right(150, 200),
    "fp16_ct_sft": first_right(140, 200),
    "bitnet_sft": first_right(120, 200),
    "bitdistill": first_right(145, 200),
}


def changed(path: Path, **changes: Any) -> None:
    """Change or (with None) delete keys of a record, ``rows__bitdistill__items_hex`` for one inside."""
    record = json.loads(path.read_text())
    for key, value in changes.items():
        *outer, last = key.split("__")
        place = record
        for name in outer:
            place = place[name]
        if value is None:
            del place[last]
        else:
            place[last] = value
    path.write_text(json.dumps(record))


def text_of(folder: Path) -> str:
    """All words of a folder's page."""
    return words_of(tree_of(write_report(folder)[0]))


def rows_of(folder: Path, name: str) -> list[tuple[str, ...]]:
    """Rows of a table, without the report."""
    found = studies(read_study(folder)[0])
    return study_tables(found, main_entries(found)[0])[name].rows


def test_reader_and_writer_agree_on_the_format() -> None:
    assert record_of(ROWS)["format"] == FORMAT


def test_items_are_read_as_they_were_written(tmp_path: Path) -> None:
    rouge = [0.125, 0.5, 1 / 3, 0.0, 1.0]
    rows = {"bitdistill": rouge, "fp16_sft": [1.0, 0.0, 0.0, 1.0, 1.0]}
    write_record(tmp_path, record_of(rows))
    (record,), notes = read_study(tmp_path)
    assert notes == []
    assert record.items["bitdistill"].tolist() == pytest.approx(rouge, rel=1e-5)
    assert record.items["fp16_sft"].tolist() == rows["fp16_sft"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rows__bitdistill__items_hex": "ff"}, '"bitdistill" has not 200 items'),
        ({"rows__bitdistill__items_hex": "zz"}, "non-hexadecimal"),
        ({"rows__bitdistill__items_hex": None}, '"items" is missing'),
        ({"rows__bitdistill__accuracy": 0.9}, 'the score of "bitdistill" is not the mean of its items'),
        ({"rows__bitdistill__accuracy": float("nan")}, "is not the mean of its items"),
        ({"rows__bitdistill__accuracy": "high"}, "'high', not a number"),
        ({"rows__bitdistill__steps": "all"}, "another shape"),
        ({"rows__bitdistill": 3}, '"bitdistill" is not an object'),
        ({"rows": {}}, '"rows" is empty'),
        ({"rows": []}, '"rows" is missing or of another kind'),
        ({"meta": None}, '"meta" is missing'),
        ({"base": "small"}, '"base" is missing or of another kind'),
        ({"point": []}, '"point" is missing or of another kind'),
        ({"seed": "0"}, '"seed" is missing or of another kind'),
        ({"seed": -1}, "too small"),
        ({"num_items": True}, '"num_items" is missing or of another kind'),
        ({"num_items": 0}, "too small"),
        ({"steps__pretrain-subln": []}, '"pretrain-subln" is missing or of another kind'),
        ({"steps__pretrain-subln__curves__loss__value": "1 2"}, '"loss" of "pretrain-subln" has 3 steps and 2'),
        ({"steps__pretrain-subln__curves__loss__step": "a b c"}, "could not convert"),
        ({"steps__pretrain-subln__weights__counts": "1 -2"}, "is no histogram"),
        ({"steps__pretrain-subln__weights__low": None}, "is no histogram"),
    ],
)  # fmt: skip
def test_a_damaged_record_is_named_and_the_others_are_shown(
    tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    write_record(tmp_path, record_of(ROWS, task="qnli"), "whole.json")
    changed(write_record(tmp_path, record_of(ROWS), "bad.json"), **changes)
    (note,) = read_study(tmp_path)[1]
    assert note.startswith("main/bad.json is damaged") and problem in note
    assert [row[0] for row in rows_of(tmp_path, "main")] == ["qnli"]


@pytest.mark.parametrize("content", [b"", b'{"format": 1, "stu', b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_cut_or_no_text(tmp_path: Path, content: bytes) -> None:
    path = write_record(tmp_path, record_of(ROWS), "bad.json")
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"main/bad\.json is damaged") as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("report.*"))
    write_record(tmp_path, record_of(ROWS), "whole.json")
    assert "main/bad.json is damaged" in text_of(tmp_path)


def test_a_foreign_file_is_named(tmp_path: Path) -> None:
    write_record(tmp_path, record_of(ROWS))
    (tmp_path / "main" / "norms.json").write_text('{"ce": 1.5}')
    (tmp_path / "main" / "list.json").write_text("[1]")
    remedy = "is no record of a run and was left out."
    assert read_study(tmp_path)[1] == [f"main/list.json {remedy}", f"main/norms.json {remedy}"]


def test_another_format_is_refused_with_the_remedy(tmp_path: Path, cli: Any) -> None:
    write_record(tmp_path, record_of(ROWS))
    path = write_record(tmp_path, record_of(ROWS, task="qnli") | {"format": 2})
    outcome = cli("report", tmp_path)
    assert outcome.status == 1 and "Traceback" not in outcome.err
    message = " ".join(outcome.err.split())
    assert (
        str(path) in message and "format '2'" in message and "reads 1" in message and "move it out" in message
    )
    assert not list(tmp_path.glob("report.*"))


def test_the_same_run_twice_counts_once(tmp_path: Path) -> None:
    write_record(tmp_path, record_of(ROWS), "a.json")
    write_record(tmp_path, record_of(ROWS | {"bitdistill": first_right(10, 200)}), "b.json")
    assert read_study(tmp_path)[1] == [
        "main/b.json is the same point and seed as main/a.json and was left out."
    ]
    assert rows_of(tmp_path, "main")[0][7] == "72.50"


def test_rows_that_answered_other_items_are_not_paired(tmp_path: Path) -> None:
    """In one run that cannot be; between points it can, and between seeds of one. As many are not yet the same."""
    common = {"study": "sizes", "judged_on": "validation"}
    for value, right, items in ((100, 60, 100), (200, 130, 200), (300, 65, 100)):
        rows = {"bitdistill": first_right(right, items)}
        point = {"task.max_train_examples": value}
        write_record(tmp_path, record_of(rows, point=point, reference=value == 100, **common))
    rows = {"bitdistill": first_right(50, 200)}
    write_record(
        tmp_path, record_of(rows, seed=1, point={"task.max_train_examples": 300}, reference=False, **common)
    )
    point = {"task.max_train_examples": 400}
    others = {"items_digest": "second 100", "reference": False}
    write_record(tmp_path, record_of({"bitdistill": first_right(70, 100)}, point=point, **others, **common))
    assert [row[1:] for row in rows_of(tmp_path, "study sizes")] == [
        ("60.00 (1 seed)", "reference"),
        ("65.00 (1 seed)", "not paired"),
        ("45.00 ± 28.28", "not paired"),  # 65 and 25 per cent
        ("70.00 (1 seed)", "not paired"),
    ]
    assert "rows that answered other items cannot be paired" in text_of(tmp_path)


def test_main_rows_that_cannot_be_paired(tmp_path: Path) -> None:
    """Two seeds on other numbers of items: means stand, nothing is compared."""
    write_record(tmp_path, record_of(ROWS))
    halves = {method: items[::2] for method, items in ROWS.items()}
    write_record(tmp_path, record_of(halves, seed=1))
    row = html_tables(tree_of(write_report(tmp_path)[0]))["The four methods"][1]
    assert row[4] == "75.00 ± 0.00" and row[8] == row[9] == "not paired" and row[11] == "not paired"
    entry = json.loads((tmp_path / "summary.json").read_text())[0]
    assert entry["diff_ci95"] is None and entry["gap_closure"]["ci95"] is None


@pytest.mark.parametrize(
    ("point", "first"),
    [({"distill.lambda_logits": 1.0}, "lambda_logits 1"), ({"distill.lambda_logits": 0.25}, "lambda_logits 0.25")],
)  # fmt: skip
def test_without_a_mark_the_reference_has_the_recipe_s_defaults(
    tmp_path: Path, point: dict[str, float], first: str
) -> None:
    """distill.lambda_logits is 1 by default; where no point has that, the first one is taken."""
    for number, values in enumerate(({"distill.lambda_logits": 0.5}, point)):
        record = record_of({"bitdistill": first_right(50 + number, 100)}, study="kd", point=values)
        del record["reference"]
        write_record(tmp_path, record)
    rows = rows_of(tmp_path, "study kd")
    assert [row[0] for row in rows] == [first, "lambda_logits 0.5"]
    assert rows[0][2] == "reference"


def test_keys_with_one_last_part_are_told_apart(tmp_path: Path) -> None:
    for rate, batch in ((1e-3, 8), (2e-3, 16)):
        point = {
            "sft.learning_rate": rate,
            "distill.learning_rate": rate,
            "sft.batch_size": batch,
            "sft.epochs": 2,
        }
        record = record_of({"bitdistill": first_right(50, 100)}, study="rates", point=point)
        write_record(tmp_path, record | {"reference": rate == 1e-3})
    record = record_of(
        {"bitdistill": first_right(51, 100)}, study="rates", seed=0, point={"sft.learning_rate": 4e-3}
    )
    write_record(tmp_path, record | {"reference": False})
    assert {row[0] for row in rows_of(tmp_path, "study rates")} >= {
        "sft.learning_rate 0.001, distill.learning_rate 0.001, batch_size 8, epochs 2",
        "sft.learning_rate 0.004",
    }


def test_records_below_the_folder_of_a_sweep_are_found(tmp_path: Path) -> None:
    write_record(tmp_path / "records", record_of(ROWS))
    assert "1 run of 1 study" in text_of(tmp_path)


def test_bare_records_are_enough(tmp_path: Path) -> None:
    rows = {
        key: {"accuracy": row_of(key, items)["accuracy"], "items": " ".join(map(str, items))}
        for key, items in ROWS.items()
    }
    record = record_of(rows, num_items=200) | {"meta": {}, "base": {}, "steps": {}, "preset": None}
    write_record(tmp_path, {key: value for key, value in record.items() if key not in ("title", "reference")})
    html = write_report(tmp_path)[0]
    row = html_tables(tree_of(html))["The four methods"][1]
    assert row[:5] == ["sst2", "size not recorded", "", "1", "75.00"]
    assert json.loads((tmp_path / "summary.json").read_text())[0]["informative"] is True  # no class is known


def test_a_failed_run_alone(tmp_path: Path) -> None:
    write_record(tmp_path, record_of({}) | {"failed": "loss is not finite"})
    text = text_of(tmp_path)
    assert "1 run of 1 study; 1 failed." in text and "there is no main table" in text
    assert json.loads((tmp_path / "summary.json").read_text()) == []


def test_a_run_and_a_pre_trained_model_stay_what_they_were(tmp_path: Path) -> None:
    make_known_run(tmp_path / "run")
    write_record(tmp_path / "run", record_of(ROWS))
    assert [path.name for path in write_report(tmp_path / "run")] == ["report.html", "report.md"]
    write_base(tmp_path / "bases" / "native", heldout=3.0, ternary=True)
    write_report(tmp_path / "bases")
    assert "Pre-trained from scratch" in (tmp_path / "bases" / "report.md").read_text()


def test_a_folder_of_nothing(tmp_path: Path, cli: Any) -> None:
    outcome = cli("report", tmp_path / "missing")
    message = " ".join(outcome.err.split())
    assert outcome.status == 1 and "Traceback" not in outcome.err
    for kind in ("bitdistill run", "bitdistill base", "bitdistill sweep"):
        assert kind in message


def test_the_command_names_the_files(tmp_path: Path, cli: Any) -> None:
    write_record(tmp_path, record_of(ROWS))
    outcome = cli("report", tmp_path, "--json", tmp_path / "out.json")
    assert outcome.status == 0, outcome.err
    names = {"html": "report.html", "markdown": "report.md", "summary": "summary.json"}
    assert json.loads((tmp_path / "out.json").read_text()) == {k: str(tmp_path / v) for k, v in names.items()}


def test_without_matplotlib_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_record(tmp_path, record_of(ROWS))
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(BitDistillError, match=r"bitdistill\[report\]"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["main"]
