"""The report of a study with known numbers: ``summary.json``, tables and page. Expected cells are written by hand."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study_records import first_right, record_of, row_of, step_of, write_record
from test_report import _References, charts_of, html_tables, markdown_tables, tree_of, words_of

from bitdistill.report.study.cells import studies
from bitdistill.report.study.reading import read_study
from bitdistill.report.study.results import Entry, main_entries, summary_json
from bitdistill.report.study.tables import main_table
from bitdistill.report.write import write_report

pytest.importorskip("matplotlib")

ITEMS = 200
FOUR = ("fp16_sft", "fp16_ct_sft", "bitnet_sft", "bitdistill")


def four(*right: int, items: int = ITEMS) -> dict[str, list[float]]:
    """Items of the four methods, of which so many are right."""
    return {method: first_right(count, items) for method, count in zip(FOUR, right, strict=True)}


def entries_of(folder: Path) -> list[Entry]:
    """Rows of the main table of a folder of records."""
    records, notes = read_study(folder)
    assert notes == []
    return main_entries(studies(records))[0]


def summary_of(folder: Path) -> list[dict[str, Any]]:
    """``summary.json`` of a folder of records, without the report."""
    return json.loads(json.dumps(summary_json(entries_of(folder)), allow_nan=False))


def one_row(folder: Path, rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The entry of a folder with one record of these rows."""
    write_record(folder, record_of(rows, **more))
    (entry,) = summary_of(folder)
    return entry


def main_cells(folder: Path) -> list[dict[str, str]]:
    """Rows of the main table by heading."""
    table = main_table(entries_of(folder))
    return [dict(zip(table.header, row, strict=True)) for row in table.rows]


# --- summary.json ---


def test_summary_by_hand(tmp_path: Path) -> None:
    """Shares 0.80, 0.82, 0.84 and so on: means and sample deviations are written out here."""
    for seed, right in enumerate(((160, 170, 120, 160), (164, 170, 120, 160), (168, 170, 120, 163))):
        write_record(tmp_path, record_of(four(*right), seed=seed))
    (entry,) = summary_of(tmp_path)
    assert list(entry) == [
        "task",
        "size",
        "preset",
        "seeds",
        *FOUR,
        "gap_closure",
        "diff_ci95",
        "informative",
    ]
    assert (entry["task"], entry["size"], entry["preset"]) == ("sst2", "1.6M", "default")
    assert entry["seeds"] == [0, 1, 2]
    assert entry["fp16_sft"] == pytest.approx({"mean": 0.82, "sd": 0.02})
    assert entry["fp16_ct_sft"] == pytest.approx({"mean": 0.85, "sd": 0.0}, abs=1e-12)
    assert entry["bitnet_sft"] == pytest.approx({"mean": 0.60, "sd": 0.0}, abs=1e-12)
    assert entry["bitdistill"] == pytest.approx(
        {"mean": 0.805, "sd": math.sqrt((2 * 0.005**2 + 0.01**2) / 2)}
    )
    assert entry["gap_closure"]["mean"] == pytest.approx((0.805 - 0.6) / (0.85 - 0.6))
    low, high = entry["gap_closure"]["ci95"]
    assert 0.6 < low < 0.82 < high < 1
    low, high = entry["diff_ci95"]
    # Items 160 to 169 differ, of 200: 10 wrong against right, and 1.67 of those on average over seeds.
    assert -0.09 < low < 0.805 - 0.85 < high < 0
    assert entry["informative"] is True


def test_difference_is_the_normal_approximation_s(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    rows = {
        method: (rng.random(4000) < share).astype(float)
        for method, share in zip(FOUR, (0.7, 0.6, 0.5, 0.68), strict=True)
    }
    entry = one_row(tmp_path, {method: items.tolist() for method, items in rows.items()})
    difference = rows["bitdistill"] - rows["fp16_sft"]
    error = difference.std() / math.sqrt(4000)
    expected = [difference.mean() - 1.96 * error, difference.mean() + 1.96 * error]
    assert entry["diff_ci95"] == pytest.approx(expected, abs=0.2 * error)


def test_equal_rows_are_certainly_equal(tmp_path: Path) -> None:
    """BitDistill answers as the better full-precision row does; the worse one plays no part."""
    entry = one_row(tmp_path, four(140, 150, 120, 150))
    assert entry["diff_ci95"] == [0, 0]
    assert entry["gap_closure"] == {"mean": 1, "ci95": [1, 1]}


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    entry = one_row(tmp_path, four(150, 140, 120, 145))
    assert [entry[method]["sd"] for method in FOUR] == [None] * 4
    assert entry["seeds"] == [0]
    text = " ".join(main_table(entries_of(tmp_path)).notes)
    assert "of one seed, over items alone" in text and "Rows of one seed have no spread" in text
    assert main_cells(tmp_path)[0]["FP16-SFT"] == "75.00"


@pytest.mark.parametrize(("direct", "shown"), [(112, "0.50 ["), (113, "- (gap 3.5 points)")])
def test_closure_is_given_from_four_points(tmp_path: Path, direct: int, shown: str) -> None:
    """120 - 112 of 200 is 4 points."""
    entry = one_row(tmp_path, four(120, 100, direct, 116))
    found = entry["gap_closure"]
    assert found is None or found["mean"] == pytest.approx(0.5)
    assert (found is None) == (direct == 113)
    assert main_cells(tmp_path)[0]["Gap closure"].startswith(shown)


def test_closure_of_a_gap_that_is_in_doubt_has_no_interval(tmp_path: Path) -> None:
    """A gap of 5 points on 40 items, 8 of them in either direction: in many draws there is none."""
    items = [1.0] * 20 + [0.0] * 20
    turned = [1.0] * 17 + [0.0] * 3 + [1.0] + [0.0] * 19
    entry = one_row(
        tmp_path, {"fp16_sft": items, "fp16_ct_sft": items, "bitnet_sft": turned, "bitdistill": items}
    )
    assert entry["gap_closure"] == {"mean": 1, "ci95": None}
    assert main_cells(tmp_path)[0]["Gap closure"] == "1.00 [not certain]"


@pytest.mark.parametrize(("right", "informative"), [(110, True), (109, False)])
def test_informative_from_five_points_above_the_commonest_class(
    tmp_path: Path, right: int, informative: bool
) -> None:
    entry = one_row(tmp_path, four(right, 100, 90, right))
    assert entry["informative"] is informative
    verdict = main_cells(tmp_path)[0]["Against the bar"]
    assert (verdict == "uninformative: proves nothing") is not informative


def test_a_row_that_is_missing_is_null(tmp_path: Path) -> None:
    rows = four(150, 140, 120, 145)
    del rows["fp16_ct_sft"]
    entry = one_row(tmp_path, rows)
    assert entry["fp16_ct_sft"] is None
    assert entry["fp16_sft"]["mean"] == 0.75
    assert main_cells(tmp_path)[0]["FP16-CT-SFT"] == "not recorded"


def test_without_full_precision_nothing_is_compared(tmp_path: Path) -> None:
    rows = four(150, 140, 120, 145)
    entry = one_row(tmp_path, {method: rows[method] for method in ("bitnet_sft", "bitdistill")})
    assert (entry["diff_ci95"], entry["gap_closure"], entry["informative"]) == (None, None, False)
    assert main_cells(tmp_path)[0]["Against the bar"] == "rows are missing"


def test_only_final_rows_of_presets_are_in_the_summary(tmp_path: Path) -> None:
    """Not what was judged on held-out data, not other points, and of other studies not a second main table."""
    rows = four(150, 140, 120, 145)
    write_record(tmp_path, record_of(rows))
    write_record(tmp_path, record_of(rows, point={"distill.preset": "paper"}, preset="paper"))
    write_record(
        tmp_path, record_of(rows, point={"distill.preset": "paper", "sft.epochs": 1}, preset="paper")
    )
    write_record(tmp_path, record_of(rows, study="screen", judged_on="validation", task="qnli"))
    write_record(tmp_path, record_of({"bitdistill": rows["bitdistill"]}, study="alone", task="mnli"))
    write_record(tmp_path, record_of(four(190, 190, 190, 190), study="a-second"))
    write_record(tmp_path, record_of(rows, study="a-second", task="rte"))
    entries = summary_of(tmp_path)
    assert [(e["task"], e["preset"], e["fp16_sft"]["mean"]) for e in entries] == [
        ("rte", "default", 0.75),
        ("sst2", "default", 0.75),
        ("sst2", "paper", 0.75),
    ]
    (note,) = main_entries(studies(read_study(tmp_path)[0]))[1]
    assert note.endswith("stands in the main table as main has it; a-second has it too.")


def test_sizes_and_their_order(tmp_path: Path) -> None:
    rows = four(150, 140, 120, 145)
    bases = [("d1", 16_000_000), ("d2", 4_910_080), ("d3", 4_912_000), ("d4", 1_700_000_000)]
    for digest, size in bases:
        base = {"digest": digest, "source": f"bases/{digest}-base/", "non_embedding_parameters": size}
        write_record(tmp_path, record_of(rows, base=base))
    assert [entry["size"] for entry in summary_of(tmp_path)] == [
        "4.9M (d2-base)",
        "4.9M (d3-base)",
        "16.0M",
        "1.7B",
    ]


def test_a_base_that_each_seed_makes_is_one_base(tmp_path: Path) -> None:
    for seed in (0, 1):
        meta = {"recipe": {"name": "x", "base": {"hidden_size": 64}}}
        base = {"digest": f"d{seed}", "source": f"runs/s{seed}/base"}
        write_record(tmp_path, record_of(four(150, 140, 120, 145), seed=seed, base=base, meta=meta))
    (entry,) = summary_of(tmp_path)
    assert entry["seeds"] == [0, 1] and entry["size"] == "1.6M"


# --- the bar ---


@pytest.mark.parametrize(
    ("task", "right", "verdict"),
    [
        ("sst2", (150, 140, 120, 150), "reached"),
        ("sst2", (150, 140, 120, 160), "reached"),
        ("mnli", (150, 140, 120, 146), "closure by 0.03"),  # 26 / 30
        ("unknown", (150, 140, 120, 150), "no bar for this task"),
    ],
)
def test_verdicts(tmp_path: Path, task: str, right: tuple[int, ...], verdict: str) -> None:
    write_record(tmp_path, record_of(four(*right), task=task))
    (row,) = main_cells(tmp_path)
    assert verdict in row["Against the bar"]
    assert row["Against the bar"].startswith("missed") == ("closure" in verdict)


@pytest.mark.parametrize(("task", "bar"), [("sst2", -2.0), ("qnli", -1.0), ("mnli", -1.0)])
def test_the_lower_bound_decides(tmp_path: Path, task: str, bar: float) -> None:
    """Of 2,000 items the rows differ on 4, 20 and 60: by 0.2, 1 and 3 points; bounds are 0.2, 0.45 and 0.75 lower."""
    found = []
    for right in (1796, 1780, 1740):
        folder = tmp_path / str(right)
        write_record(folder, record_of(four(1800, 0, 1740, right, items=2000), task=task))
        (row,) = main_cells(folder)
        low = float(re.search(r"\[([^,]+),", row["BitDistill - better FP16, points"]).group(1))
        found.append(low > bar)
        assert row["Against the bar"] == (
            "reached" if low > bar else f"missed: the lower bound by {bar - low:.2f} points"
        )
    assert found == [True, task == "sst2", False]


# --- tables and page ---


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """A main study of two sizes, two presets and two seeds, and a screen; to read only."""
    folder = tmp_path_factory.mktemp("study")
    for size, digest in ((1_600_000, "d1"), (4_900_000, "d2")):
        base = {"non_embedding_parameters": size, "digest": digest}
        for preset in ("default", "paper"):
            for seed in (0, 1):
                rows = four(150, 140, 120, 145 + seed - 10 * (preset == "paper"))
                record = record_of(
                    rows, seed=seed, base=base, point={"distill.preset": preset}, preset=preset
                )
                record["steps"]["bitdistill/lr-0.002"] = step_of("stage3_distill", 0.5 * (preset == "paper"))
                if seed == 0:
                    for row in record["rows"].values():
                        row["grid"] = {"0.0002": 0.4, "0.002": 0.5, "0.02": 0.3}
                    record["rows"]["bitnet_sft"] |= {"learning_rate": 0.0002}
                record["reference"] = preset == "default"
                write_record(folder, record)
    for gamma, right in ((10.0, 60), (1.0, 58), (0.5, 40)):
        rows = {"fp16_sft": first_right(70, 100), "bitdistill": first_right(right, 100)}
        write_record(
            folder,
            record_of(
                rows | {"bitdistill:no_subln": first_right(30, 100)} if gamma == 1 else rows,
                study="gamma",
                title="Which gamma?",
                point={"distill.gamma_relation": gamma, "sft.epochs": 2},
                reference=gamma == 1,
                judged_on="validation",
            ),
        )
    failed = record_of(
        {},
        study="gamma",
        point={"distill.gamma_relation": 1e5, "sft.epochs": 2},
        reference=False,
        judged_on="validation",
    )
    write_record(folder, failed | {"failed": "loss is not finite"})
    return write_report(folder)


def test_files_of_a_study(written: tuple[Path, ...]) -> None:
    assert [path.name for path in written] == ["report.html", "report.md", "summary.json"]
    assert written[0].stat().st_size < 1_000_000
    entries = json.loads(written[2].read_text(encoding="utf-8"))
    assert [(entry["size"], entry["preset"]) for entry in entries] == [
        (size, preset) for size in ("1.6M", "4.9M") for preset in ("default", "paper")
    ]


def test_same_records_same_bytes(tmp_path: Path) -> None:
    write_record(tmp_path, record_of(four(150, 140, 120, 145)))
    first = [path.read_bytes() for path in write_report(tmp_path)]
    assert [path.read_bytes() for path in write_report(tmp_path)] == first
    assert {path.name for path in tmp_path.iterdir()} == {"main", "report.html", "report.md", "summary.json"}


def test_main_table(written: tuple[Path, ...]) -> None:
    header, *cells = html_tables(tree_of(written[0]))["The four methods"]
    rows = [dict(zip(header, row, strict=True)) for row in cells]
    assert [(row["Task"], row["Size"], row["Preset"], row["Seeds"]) for row in rows] == [
        ("sst2", size, preset, "2") for size in ("1.6M", "4.9M") for preset in ("default", "paper")
    ]
    first, paper = rows[:2]
    assert [first[name] for name in ("FP16-SFT", "FP16-CT-SFT", "BitNet-SFT", "BitDistill")] == [
        "75.00 ± 0.00",
        "70.00 ± 0.00",
        "60.00 ± 0.00",
        "72.75 ± 0.35",  # 72.5 and 73
    ]
    assert first["BitNet-SFT - better FP16, points"].startswith("-15.00 [")
    assert first["BitDistill - better FP16, points"].startswith("-2.25 [")
    assert first["Gap closure"].startswith("0.85 [")  # 12.75 / 15
    assert paper["BitDistill - better FP16, points"].startswith("-7.25 [")


def test_study_table(written: tuple[Path, ...]) -> None:
    rows = html_tables(tree_of(written[0]))["gamma: Which gamma?"]
    assert rows[0] == ["Point", "Method", "sst2 1.6M", "Difference, points"]
    assert [row[:3] for row in rows[1:]] == [
        ["every point", "FP16-SFT", "70.00"],
        ["gamma_relation 1", "BitDistill", "58.00"],
        ["gamma_relation 1", "bitdistill:no_subln", "30.00"],
        ["gamma_relation 0.5", "BitDistill", "40.00"],
        ["gamma_relation 10", "BitDistill", "60.00"],
        ["gamma_relation 100000", "BitDistill", "failed"],
    ]
    assert rows[2][3] == "reference"
    assert rows[1][3].startswith("+12.00 [")
    assert rows[4][3].startswith("-18.00 [")
    low, high = map(float, re.search(r"\[(.*), (.*)\]", rows[4][3]).groups())
    error = 100 * math.sqrt(0.18 * 0.82 / 100)  # 18 of 100 items differ, all in one direction
    assert (low, high) == pytest.approx((-18 - 1.96 * error, -18 + 1.96 * error), abs=0.3 * error)
    assert rows[6][3] == ""
    text = words_of(tree_of(written[0]))
    assert "gamma/011.json failed: loss is not finite" in text
    assert "on held-out training items; the test items stayed shut" in text


def test_learning_rates_and_edges(written: tuple[Path, ...]) -> None:
    rows = html_tables(tree_of(written[0]))["Learning rates"]
    found = {tuple(row[2:4]): row[4:] for row in rows[1:]}
    grid = "0.0002 0.002 0.02"
    assert found["1.6M", "every point, FP16-SFT"] == [grid, "0.002", ""]
    # Of the seed that had the grid, and of the one that has another rate.
    assert found["1.6M", "every point, BitNet-SFT"] == [grid, "0.0002, 0.002", "lower edge"]
    assert found["4.9M", "preset paper, BitDistill"] == [grid, "0.002", ""]
    assert "2 of 10 choices lie on the edge" in words_of(tree_of(written[0]))


def test_costs(written: tuple[Path, ...]) -> None:
    rows = html_tables(tree_of(written[0]))["Costs"]
    assert rows[0][3:] == ["Method", "Refine", "Pretrain", "Distill", "Fine-tune", "Total"]
    found = {tuple(row[1:4]): row[4:] for row in rows[1:]}
    assert found["1.6M", "", "FP16-CT-SFT"] == ["", "2 min 00 s", "", "30.0 s", "2 min 30 s"]
    assert found["1.6M", "paper", "BitDistill"] == ["1.0 s", "2 min 00 s", "1 min 00 s", "", "3 min 01 s"]


def test_a_seed_on_a_busy_machine_does_not_set_the_cost(tmp_path: Path) -> None:
    """Three seeds take 30, 32 and 600 seconds."""
    for seed, seconds in enumerate((600.0, 30.0, 32.0)):
        row = row_of("fp16_sft", first_right(150, 200), time_s={"fp16_sft/lr-0.002": seconds})
        write_record(tmp_path, record_of({"fp16_sft": row}, seed=seed, num_items=200))
    rows = html_tables(tree_of(write_report(tmp_path)[0]))["Costs"]
    assert rows[1][-2:] == ["32.0 s", "32.0 s"]


def test_charts(written: tuple[Path, ...]) -> None:
    page = tree_of(written[0])
    charts = charts_of(page)
    assert charts[0] == "Accuracy against size, sst2"
    assert charts[1] == "sst2 1.6M: difference to gamma_relation 1 · BitDistill"
    assert [chart for chart in charts if "stage 2" in chart] == [
        f"{size}: cross-entropy of stage 2" for size in ("1.6M", "4.9M")
    ]
    sections = {str(s.findtext("h3")): s for s in page.iter("section")}
    direct, distilled = (
        ("refine-none", "bitnet_sft/lr-0.002"),
        ("refine-subln", "pretrain-subln", "bitdistill/lr-0.002"),
    )
    one = [f"sst2 1.6M, default: {name}" for name in (*direct, *distilled)]
    assert list(sections) == [
        *one,
        "sst2 1.6M, paper: bitdistill/lr-0.002",  # the other steps are shared
        *(title.replace("1.6M", "4.9M") for title in one),
        "sst2 4.9M, paper: bitdistill/lr-0.002",
    ]
    before_and_after = "Weights before and after"
    assert charts_of(sections[one[0]]) == ["Weights after (before: not recorded)"]
    assert charts_of(sections[one[3]]) == ["Flips per code in 1,000 steps", before_and_after]
    assert charts_of(sections[one[4]]) == [
        "Loss parts, weighted",
        "Flips per code in 1,000 steps",
        before_and_after,
    ]
    # 0.0004 of one step is 0.4 of a thousand.
    texts = {words_of(text) for text in sections[one[3]].iter("text")}
    assert "0.40" in texts
    shares = html_tables(page)["Trit shares"]
    assert shares[1] == [one[0], "25.00%", "45.00%", "30.00%", "6.10%", "4.56%", "-"]
    assert shares[4][-1] == "0.30"  # the mean of 0.0004 and 0.0002
    assert len(shares) == 1 + len(sections)


def test_the_size_chart_places_scores_where_they_are(written: tuple[Path, ...]) -> None:
    """Markers, read from the drawing in units of its axis, lie as far apart as the scores of the table."""
    figures = tree_of(written[0]).iter("figure")
    figure = next(f for f in figures if "against size" in str(f.findtext("figcaption")))
    ticks = {t.text: float(t.get("y", "nan")) for t in figure.iter("text") if t.text in ("50", "80")}
    pixels = (ticks["50"] - ticks["80"]) / 30
    markers: dict[str, list[float]] = {}
    for line in (g for g in figure.iter("g") if g.get("clip-path")):
        for use in line.iter("use"):
            colour = re.findall(r"--(\w+)", use.get("style", ""))[0]
            markers.setdefault(colour, []).append(float(use.get("y", "nan")))
    below = {name: [(y - markers["ink"][0]) / pixels for y in ys] for name, ys in markers.items()}
    expected = {"ink": 0, "muted": 5, "orange": 15, "blue": 2.25, "green": 7.25}  # points below FP16-SFT
    assert below == {name: pytest.approx([value] * 2, abs=0.05) for name, value in expected.items()}


def test_markdown_has_the_same_tables(written: tuple[Path, ...]) -> None:
    text = written[1].read_text(encoding="utf-8")
    tables = {
        heading: [[cell.replace("\\", "") for cell in row] for row in rows]
        for heading, rows in markdown_tables(text).items()
    }
    assert tables == html_tables(tree_of(written[0]))
    assert list(tables) == [
        "The four methods",
        "gamma: Which gamma?",
        "Learning rates",
        "Costs",
        "Trit shares",
    ]


def test_the_page_is_self_contained(written: tuple[Path, ...]) -> None:
    text = written[0].read_text(encoding="utf-8")
    seen = _References()
    seen.feed(text)
    assert not seen.tags & {"script", "link", "iframe", "object", "img", "base"}
    assert len(seen.ids) == len(set(seen.ids))
    assert {target.removeprefix("#") for target in seen.targets} <= set(seen.ids)
    assert "http" not in text


def test_where_the_numbers_come_from(written: tuple[Path, ...]) -> None:
    page = tree_of(written[0])
    text = words_of(page)
    for part in ("Machine: Known CPU.", "Git revision: 4a7a3781d2aa.", "torch 2.13.0"):
        assert part in text
    assert "12 runs of 2 studies; 1 failed. Of 4 rows that can be held against the bar, 0 reach it." in text
    assert {d.findtext("summary") for d in page.iter("details")} == {
        "gamma: gamma/009.json",
        "main: main/000.json",
    }


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    nasty = "<script>alert('x')</script> | `a` $x_{"
    rows: dict[str, Any] = {
        "fp16_sft": first_right(150, 200),
        "bitdistill": row_of("bitdistill", first_right(140, 200), label=nasty),
    }
    base = {"source": f"bases/{nasty}"}
    common = {"num_items": 200, "task": nasty, "title": nasty, "preset": nasty, "base": base}
    meta = {"machine": nasty, "versions": {nasty: nasty}, "recipe": {nasty: "\x00"}, "finished": nasty}
    write_record(tmp_path, record_of(rows, meta=meta, **common))
    for value in (nasty, "plain"):
        write_record(
            tmp_path, record_of(rows, study="other", point={"task.template": value}, meta=meta, **common)
        )
    write_record(
        tmp_path, record_of({}, **common, point={nasty: nasty}, study="other") | {"failed": nasty, "rows": {}}
    )
    html, markdown, summary = write_report(tmp_path)
    page = tree_of(html)
    seen = _References()
    seen.feed(html.read_text(encoding="utf-8"))
    assert "script" not in seen.tags
    assert html_tables(page)["The four methods"][1][0] == nasty
    text = markdown.read_text(encoding="utf-8")
    assert "<script>" not in text
    for rows_found in markdown_tables(text).values():
        assert len({len(row) for row in rows_found}) == 1
    assert json.loads(summary.read_text(encoding="utf-8"))[0]["task"] == nasty
