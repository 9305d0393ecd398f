"""The report of a run folder with known numbers.

The page is read by ``xml.etree`` (it is well-formed) and ``html.parser``, the Markdown tables by
splitting lines; the expected cells are written here by hand.
"""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bitdistill.errors import BitDistillError, CheckpointError
from bitdistill.report.collect import collect
from bitdistill.report.html import render_html
from bitdistill.report.write import write_report

pytest.importorskip("matplotlib")

EDGES = [-1.0, -0.5, 0.0, 0.5, 1.0]


def method_row(label: str, accuracy: float, steps: dict[str, float], **more: Any) -> dict[str, Any]:
    """One method row of result.json."""
    return {
        "label": label,
        "accuracy": accuracy,
        "stderr": 0.004,
        "bytes": 15_000_000,
        "parameters": 7_500_000,
        "learning_rate": 0.001,
        "validation_accuracy": accuracy + 0.01,
        "steps": list(steps),
        "time_s": steps,
    } | more


def result_of(**rows: dict[str, Any]) -> dict[str, Any]:
    """A result.json with these rows."""
    meta = {
        "name": "known",
        "task": "sst2",
        "seed": 7,
        "eval_items": 872,
        "majority_accuracy": 0.509,
        "total_time_s": 5025.0,
        "finished": "2026-11-22T09:50:17Z",
        "versions": {"python": "3.11.2", "torch": "2.13.0"},
        "git_revision": "4a7a3781d2aa",
        "machine": "x86_64 Known CPU, 2 cores",
        "recipe": {"name": "known", "sft": {"epochs": 2.0}},
        "from_a_later_version": [1, 2],
    }
    return {"meta": meta} | {key.replace("__", ":"): row for key, row in rows.items()}


def write_step(folder: Path, stage: str, *, log: list[dict[str, Any]] | None = None, **files: Any) -> None:
    """A step folder with its record and the optional files named."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"settings": {"stage": stage}, "metrics": {}, "time_s": 1}))
    if log is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    if "flip_rate" in files:
        weights = {"edges": EDGES, "counts": [1, 2, 2, 1], "minus_frac": 0.25, "zero_frac": 0.45}
        weights |= {"plus_frac": 0.3, "near_threshold_frac": 0.061, "flip_rate": files["flip_rate"]}
        (folder / "weights.json").write_text(json.dumps(weights))
    if "surgery" in files:
        (folder / "surgery.txt").write_text(files["surgery"])


def ce_log(values: list[float]) -> list[dict[str, Any]]:
    """Log lines of a fine-tune."""
    return [
        {"step": 10 * i, "loss": ce, "loss/ce": ce, "optim/lr": 1e-3 / i, "perf/time_s": i}
        for i, ce in enumerate(values, start=1)
    ]


def kd_log() -> list[dict[str, Any]]:
    """Log lines of stage 3: raw parts six decades apart, so that the axis must be logarithmic."""
    parts = {"loss/logits_kd": 0.05, "loss/logits_kd_weighted": 0.5}
    parts |= {"loss/relation_kd": 3e-6, "loss/relation_kd_weighted": 0.3}
    return [line | parts | {"loss": line["loss/ce"] + 0.8} for line in ce_log([3.0, 2.0, 1.25])]


def make_known_run(folder: Path) -> Path:
    """Five methods; two share the refine step, one step recorded nothing but its record."""
    write_step(folder / "base", "stage2_pretrain", log=ce_log([9.0, 4.0]), flip_rate=None)
    write_step(folder / "fp16_sft", "sft", log=ce_log([1.5, 0.5]), flip_rate=0.0123)
    write_step(folder / "fp16_ct", "stage2_pretrain")
    write_step(folder / "fp16_ct_sft", "sft", log=ce_log([1.5, 0.01]))
    write_step(folder / "refine", "stage1_refine", flip_rate=0.0, surgery="qwen3: 35 linears & <SubLN>\n")
    flips = [{"quant/flip_rate": 0.0002}, {"quant/flip_rate": 0.0004}]
    log = [line | flip for line, flip in zip(ce_log([3.0, 0.7]), flips, strict=True)]
    write_step(folder / "bitnet_sft", "sft", log=log, flip_rate=0.0456)
    write_step(folder / "bitdistill" / "3-distill", "stage3_distill", log=kd_log(), flip_rate=0.0789)
    rows = {
        "fp16_sft": method_row("FP16-SFT", 0.90, {"fp16_sft": 61.2}),
        "fp16_ct_sft": method_row("FP16-CT-SFT", 0.92, {"fp16_ct": 4000.0, "fp16_ct_sft": 60.0}),
        "bitnet_sft": method_row("BitNet-SFT", 0.85, {"refine": 1.2, "bitnet_sft": 60.0}, bytes=6_250_000),
        "bitdistill": method_row(
            "BitDistill",
            0.91,
            {"refine": 1.2, "bitdistill/3-distill": 120.0},
            bytes=6_250_000,
            grid={"0.001": 0.92, "0.0003": 0.905},
            unknown="kept out",
        ),
        "bitdistill__no_pretrain": method_row("BitDistill (no pretrain)", 0.80, {"lost/step": 5.0}),
    }
    (folder / "result.json").write_text(json.dumps(result_of(**rows)))
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A known run to change."""
    return make_known_run(tmp_path)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """HTML and Markdown of a known run, to read only."""
    return write_report(make_known_run(tmp_path_factory.mktemp("known")))


@pytest.fixture(scope="module")
def page(written: tuple[Path, Path]) -> ElementTree.Element:
    """The page as a tree."""
    return tree_of(written[0])


def tree_of(path: Path) -> ElementTree.Element:
    """A page as a tree; parsing fails unless it is well-formed."""
    head, _, rest = path.read_text(encoding="utf-8").partition("\n")
    assert head == "<!DOCTYPE html>"
    return ElementTree.fromstring(rest)


def page_of(run_dir: Path) -> ElementTree.Element:
    """The page of a run."""
    return tree_of(write_report(run_dir)[0])


def words_of(element: ElementTree.Element) -> str:
    """All text below an element, white space collapsed."""
    return " ".join(" ".join(element.itertext()).split())


def html_tables(page: ElementTree.Element) -> dict[str, list[list[str]]]:
    """Rows of cells by the heading above each table."""
    tables, heading = {}, ""
    for element in page.iter():
        if element.tag == "h2":
            heading = words_of(element)
        elif element.tag == "table":
            tables[heading] = [[words_of(cell) for cell in row] for row in element.iter("tr")]
    return tables


def markdown_tables(text: str) -> dict[str, list[list[str]]]:
    """The same from Markdown; the rule below the header is left out."""
    tables: dict[str, list[list[str]]] = {}
    heading = ""
    for line in text.splitlines():
        if line.startswith("## "):
            heading = line[3:]
        elif line.startswith("| ") and not line.startswith("| ---"):
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            tables.setdefault(heading, []).append([cell.strip() for cell in cells])
    return tables


def section_of(page: ElementTree.Element, path: str) -> ElementTree.Element:
    """The section of one step."""
    return next(s for s in page.iter("section") if s.findtext("h3") == path)


def charts_of(element: ElementTree.Element) -> list[str]:
    """Captions of the figures that hold one SVG with something drawn in it."""
    figures = list(element.iter("figure"))
    assert all(len(f.findall("svg")) == 1 and f.find("svg//path") is not None for f in figures)
    return [str(f.findtext("figcaption")) for f in figures]


def test_same_run_same_bytes_and_nothing_left_behind(run_dir: Path, written: tuple[Path, Path]) -> None:
    before = {path.name for path in run_dir.iterdir()}
    assert write_report(run_dir) == (run_dir / "report.html", run_dir / "report.md")
    assert {path.name for path in run_dir.iterdir()} - before == {"report.html", "report.md"}
    for path in written:
        assert (run_dir / path.name).read_bytes() == path.read_bytes()


def test_accuracy_table(page: ElementTree.Element) -> None:
    rows = html_tables(page)["Accuracy"]
    assert rows[0][:2] == ["Method", "Accuracy"]
    assert [row[0] for row in rows[1:]] == [
        "FP16-SFT",
        "FP16-CT-SFT",
        "BitNet-SFT",
        "BitDistill",
        "BitDistill (no pretrain)",
    ]
    assert rows[4] == [
        "BitDistill",
        "91.00 ± 0.40%",
        "92.00%",
        "6.25 MB",
        "0.417",  # 6.25 / 15
        "7,500,000",
        "0.001",
        "refine 1.2 s distill 2 min 00 s",
        "2 min 01 s",
    ]
    assert rows[2][7:] == ["pretrain 1 h 06 min fine-tune 1 min 00 s", "1 h 07 min"]


def test_other_tables(page: ElementTree.Element) -> None:
    tables = html_tables(page)
    assert tables["Learning rates"] == [
        ["Method", "0.0003", "0.001"],
        ["BitDistill", "90.50%", "92.00% (chosen)"],
    ]
    shares = ["25.00%", "45.00%", "30.00%", "6.10%"]
    assert tables["Trit shares"][1:] == [
        ["base", *shares, "-", "-"],
        ["fp16_sft", *shares, "1.23%", "-"],
        ["refine", *shares, "0.00%", "-"],
        ["bitnet_sft", *shares, "4.56%", "0.30"],  # 0.0002 and 0.0004 in one step
        ["bitdistill/3-distill", *shares, "7.89%", "-"],
    ]
    steps = {row[0]: row[1:] for row in tables["Steps"]}
    assert steps["bitdistill/3-distill"][2:] == ["2 min 00 s", "30", "1.25", "2.05"]
    assert steps["refine"] == ["stage 1, refinement", "BitNet-SFT, BitDistill", "1.2 s", "-", "-", "-"]
    assert steps["fp16_ct"][3:] == ["not recorded"] * 3
    assert steps["lost/step"][0] == "not recorded"


def test_markdown_has_the_same_tables(page: ElementTree.Element, written: tuple[Path, Path]) -> None:
    text = written[1].read_text(encoding="utf-8")
    tables = markdown_tables(text)
    # HTML breaks the line where Markdown has "; ".
    assert {
        t: [[c.replace(";", "") for c in row] for row in rows] for t, rows in tables.items()
    } == html_tables(page)
    assert list(tables) == ["Accuracy", "Learning rates", "Trit shares", "Steps"]
    assert "![" not in text


def test_shared_step_is_shown_once(page: ElementTree.Element) -> None:
    headings = [section.findtext("h3") for section in page.iter("section")]
    assert headings == [
        "base",
        "fp16_sft",
        "fp16_ct",
        "fp16_ct_sft",
        "refine",
        "bitnet_sft",
        "bitdistill/3-distill",
        "lost/step",
    ]
    assert "used by BitNet-SFT, BitDistill" in words_of(section_of(page, "refine"))
    assert "used by every method" in words_of(section_of(page, "base"))


def test_one_chart_for_everything_recorded(page: ElementTree.Element) -> None:
    before_and_after = "Weights before and after"
    assert charts_of(section_of(page, "fp16_sft")) == [
        "Cross-entropy",
        "Learning rate",
        before_and_after,
    ]
    assert charts_of(section_of(page, "fp16_ct_sft"))[0] == "Cross-entropy (log scale)"  # 1.5 to 0.01
    assert charts_of(section_of(page, "refine")) == [before_and_after]
    assert charts_of(section_of(page, "base"))[-1] == "Weights after (before: not recorded)"
    assert charts_of(section_of(page, "bitdistill/3-distill")) == [
        "Loss parts, raw (log scale)",
        "Loss parts, weighted",  # 0.3 to 3.8
        "Learning rate",
        before_and_after,
    ]
    assert charts_of(section_of(page, "fp16_ct")) == charts_of(section_of(page, "lost/step")) == []
    assert len(charts_of(page)) == len(list(page.iter("svg"))) == 1 + 3 + 3 + 2 + 1 + 4 + 4
    assert "Not recorded: loss curve, weight histogram." in words_of(section_of(page, "fp16_ct"))
    assert "Not recorded: run.json, loss" in words_of(section_of(page, "lost/step"))


def test_bars_start_at_zero(page: ElementTree.Element) -> None:
    """Bars, read from the drawn paths, begin over the tick of 0 and are as long as the scores."""
    figure = next(f for f in page.iter("figure") if f.findtext("figcaption") == "Accuracy by method")
    bars = [p for p in figure.iter("path") if "opacity" in p.get("style", "") and p.get("clip-path")]
    zero = next(float(t.get("x", "nan")) for t in figure.iter("text") if t.text == "0")
    widths = []
    for bar in bars:
        xs = [float(x) for x in re.findall(r"[ML] (-?[\d.]+) ", bar.get("d", ""))]
        widths.append(max(xs) - min(xs))
        assert min(xs) == pytest.approx(zero, abs=0.01)
    assert [width / widths[0] * 90 for width in widths] == pytest.approx([90, 92, 85, 91, 80], abs=0.01)


def test_before_is_the_step_before(run_dir: Path) -> None:
    """Also for a shared step, after a base made from scratch, and if a method names that base itself."""
    result = json.loads((run_dir / "result.json").read_text())
    result["named"] = method_row("Named", 0.5, {"base": 1.0, "fp16_sft": 1.0})
    (run_dir / "result.json").write_text(json.dumps(result))
    assert {step.path: step.parent for step in collect(run_dir).steps} == {
        "base": None,
        "fp16_sft": "base",
        "fp16_ct": "base",
        "fp16_ct_sft": "fp16_ct",
        "refine": "base",
        "bitnet_sft": "refine",
        "bitdistill/3-distill": "refine",
        "lost/step": "base",
    }


def test_histogram_marks_thresholds_and_shares(page: ElementTree.Element) -> None:
    figure = list(section_of(page, "bitnet_sft").iter("figure"))[-1]
    texts = [words_of(text) for text in figure.iter("text")]
    assert {"-1: 25.0%", "0: 45.0%", "+1: 30.0%", "before", "after"} <= set(texts)
    assert sum("stroke-dasharray" in p.get("style", "") for p in figure.iter("path")) == 2


class _References(HTMLParser):
    """Collects what the page would fetch, run or point to, and its ids."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.targets: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data", "poster"):
                self.targets.append(value or "")
            elif name == "id":
                self.ids.append(value or "")
            self.targets += re.findall(r"url\(([^)]*)\)", value or "")


def test_page_is_self_contained(written: tuple[Path, Path]) -> None:
    text = written[0].read_text(encoding="utf-8")
    seen = _References()
    seen.feed(text)
    assert not seen.tags & {"script", "link", "iframe", "object", "img", "base"}
    assert len(seen.ids) == len(set(seen.ids))
    assert seen.targets
    assert {target.removeprefix("#") for target in seen.targets} <= set(seen.ids)
    assert "http" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_charts_take_their_colours_from_the_page(page: ElementTree.Element) -> None:
    """A literal colour is wrong in one of the two modes, and so is a variable that the page lacks."""
    styles = [element.get("style", "") for svg in page.iter("svg") for element in svg.iter()]
    assert not [style for style in styles if "#" in style]
    used = set(re.findall(r"var\((--\w+)\)", " ".join(styles)))
    sheet = str(page.findtext("head/style"))
    for block in re.findall(r":root \{(.*?)\}", sheet, flags=re.DOTALL):
        assert used <= set(re.findall(r"(--\w+):", block))


def test_hostile_text_stays_text(run_dir: Path) -> None:
    nasty = "<script>alert('x')</script> | `a` $x_{"
    result = json.loads((run_dir / "result.json").read_text())
    result["meta"]["name"] = result["meta"]["machine"] = nasty
    result["meta"]["recipe"] = {"name": nasty, "broken \ud800": "\x00"}
    result["bitdistill"]["label"] = nasty
    (run_dir / "result.json").write_text(json.dumps(result))
    html, markdown = write_report(run_dir)
    page = tree_of(html)
    assert page.findtext("body/h1") == nasty
    assert [row[0] for row in html_tables(page)["Accuracy"]][4] == nasty
    seen = _References()
    seen.feed(html.read_text(encoding="utf-8"))
    assert "script" not in seen.tags
    text = markdown.read_text(encoding="utf-8")
    assert "<script>" not in text.partition("```")[0]
    assert {len(row) for row in markdown_tables(text)["Accuracy"]} == {9}


def test_recipe_surgery_and_origin_are_shown(page: ElementTree.Element) -> None:
    details = {d.findtext("summary"): words_of(d) for d in page.iter("details")}
    assert '"epochs": 2.0' in details["The resolved recipe"]
    assert "35 linears & <SubLN>" in details["What stage 1 changed"]
    origin = {
        words_of(key): words_of(value) for key, value in zip(page.iter("dt"), page.iter("dd"), strict=True)
    }
    assert origin["Versions"] == "python 3.11.2, torch 2.13.0"
    assert origin["Machine"] == "x86_64 Known CPU, 2 cores"
    assert origin["Git revision"] == "4a7a3781d2aa"
    assert origin["Total time"] == "1 h 23 min"
    assert origin["Seed"] == "7"


def test_damaged_optional_files_are_named_not_fatal(run_dir: Path) -> None:
    (run_dir / "bitnet_sft" / "weights.json").write_text('{"edges": [0, 1], "counts": [1, 2]}')
    (run_dir / "fp16_sft" / "weights.json").write_text('{"edges": [0,')
    (run_dir / "fp16_ct" / "run.json").write_text("[]")
    with (run_dir / "fp16_sft" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 30, "loss": NaN, "loss/ce": NaN}\n{"step": 40, "lo')
    page = page_of(run_dir)
    for name in ("bitnet_sft/weights.json", "fp16_sft/weights.json", "fp16_ct/run.json"):
        assert f"{name} is damaged and was left out." in words_of(page)
    assert charts_of(section_of(page, "fp16_sft")) == ["Cross-entropy", "Learning rate"]


def test_bare_result_is_enough(tmp_path: Path) -> None:
    result = {"meta": {}, "bitdistill": {}, "fp16_sft": {"accuracy": 1.0, "extra": None}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    rows = html_tables(page_of(tmp_path))["Accuracy"]
    assert rows[1] == ["bitdistill", *["not recorded"] * 8]
    assert rows[2][:2] == ["fp16_sft", "100.00%"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "no such file"),
        ('{"meta": {}', "not JSON"),
        ("\xff\xfe", "damaged"),
        ("[]", '"meta"'),
        ('{"fp16_sft": {"accuracy": 1}}', '"meta"'),
        ('{"meta": {}}', "no method row"),
        ('{"meta": {}, "fp16_sft": 3}', '"fp16_sft" is not an object'),
        ('{"meta": {}, "fp16_sft": {"accuracy": "high"}}', "'high', not a number"),
        ('{"meta": {}, "fp16_sft": {"accuracy": 1, "steps": "x"}}', "another shape"),
    ],
)
def test_missing_or_damaged_result(tmp_path: Path, content: str | None, problem: str) -> None:
    if content is not None:
        (tmp_path / "result.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=re.escape(problem)) as caught:
        write_report(tmp_path)
    assert str(tmp_path / "result.json") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*report*"))


def test_without_matplotlib(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BitDistillError, match=re.escape("pip install 'bitdistill[report]'")):
        write_report(run_dir)
    assert not list(run_dir.glob("*report.*"))


def test_style_of_the_user_does_not_reach_the_page(run_dir: Path, written: tuple[Path, Path]) -> None:
    import matplotlib

    style: dict[Any, Any] = {"axes.facecolor": "#123456", "text.usetex": True, "lines.linewidth": 9}
    with matplotlib.rc_context(style):
        assert render_html(collect(run_dir)) == written[0].read_text(encoding="utf-8")


def test_import_is_light() -> None:
    code = (
        "import sys, bitdistill.report.write as w; "
        "print([m for m in ('torch', 'transformers', 'matplotlib', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_generation_task(tmp_path: Path) -> None:
    row = {"label": "BitDistill", "exact_match": 0.5, "stderr": 0.01}
    (tmp_path / "result.json").write_text(
        json.dumps({"meta": {"majority_accuracy": None}, "bitdistill": row})
    )
    page = page_of(tmp_path)
    assert html_tables(page)["Exact match"][1][:2] == ["BitDistill", "50.00 ± 1.00%"]
    assert charts_of(page) == ["Exact match by method"]
