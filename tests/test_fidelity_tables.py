"""The study's tables in README.md and docs/fidelity.md are those of the records."""

from pathlib import Path

import pytest
from fidelity_tables import FILES, NOTHING, RECORDS, read_tables, with_tables
from study_records import first_right, record_of, write_record

from bitdistill.report.study.page import SUMMARY_FILE, summary_text

ROWS = {
    "fp16_sft": first_right(150, 200),
    "fp16_ct_sft": first_right(140, 200),
    "bitnet_sft": first_right(120, 200),
    "bitdistill": first_right(145, 200),
}


def marked(name: str, text: str = "OUTDATED") -> str:
    mark = "<!-- {}: benchmarks/fidelity_tables.py -->"
    return f"{mark.format(name)}\n{text}\n{mark.format(f'end of {name}')}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_tables_in_the_docs_are_those_of_the_records(path: Path) -> None:
    tables, _ = read_tables()
    if not tables:
        pytest.skip("no run of the fidelity study is on file")
    text = path.read_text(encoding="utf-8")
    assert with_tables(text, tables) == text, "run python benchmarks/fidelity_tables.py --write"


def test_the_summary_on_file_is_that_of_the_records() -> None:
    _, entries = read_tables()
    text = (RECORDS / SUMMARY_FILE).read_text(encoding="utf-8")
    assert text == summary_text(entries), "run python benchmarks/fidelity_tables.py --write"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_docs_have_places_for_them(path: Path, tmp_path: Path) -> None:
    """A row that no file of the repository holds gets into each."""
    write_record(tmp_path, record_of({k: first_right(len(k), 7919) for k in ROWS}))
    text = path.read_text(encoding="utf-8")
    filled = with_tables(text, read_tables(tmp_path)[0])
    assert "| sst2 | 1.6M | default | 1 | 0.10 |" in filled  # 8 of 7,919
    assert with_tables(filled, read_tables(tmp_path)[0]) == filled


def test_each_mark_gets_its_table(tmp_path: Path) -> None:
    write_record(tmp_path, record_of(ROWS))
    write_record(tmp_path, record_of(ROWS, preset="paper", point={"distill.preset": "paper"}))
    for study in ("kd", "sites"):
        write_record(tmp_path, record_of(ROWS, study=study, judged_on="validation"))
    tables, _ = read_tables(tmp_path)
    names = ("main", "main paper", "study kd", "studies", "costs", "learning rates")
    text = "\n\n".join(["Before", *map(marked, names), "After"])
    found = with_tables(text, tables)
    assert found.startswith("Before\n\n") and found.endswith("\n\nAfter") and "OUTDATED" not in found
    main = found.partition("end of main")[0]
    assert (
        "### The four methods" in main
        and "| default |" in main
        and "| paper |" in main
        and "- The bar:" in main
    )
    paper = found.partition("<!-- main paper")[2].partition("end of main paper")[0]
    assert "| paper |" in paper and "| default |" not in paper and "- The bar" not in paper
    own = found.partition("<!-- study kd")[2].partition("end of study kd")[0]
    assert "### kd: Does it hold?" in own
    rest = found.partition("<!-- studies")[2].partition("end of studies")[0]
    assert "### sites: Does it hold?" in rest and "kd" not in rest
    assert NOTHING in found.partition("<!-- learning rates")[2]  # no grid was run


def test_a_table_that_cannot_be_is_refused(tmp_path: Path) -> None:
    write_record(tmp_path, record_of(ROWS))
    with pytest.raises(SystemExit, match="no table is called 'mian'"):
        with_tables(marked("mian"), read_tables(tmp_path)[0])
