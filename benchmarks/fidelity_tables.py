"""The tables of README.md and docs/fidelity.md, from the records of the fidelity study.

python benchmarks/fidelity_tables.py            prints them
python benchmarks/fidelity_tables.py --write    puts them between their marks, and summary.json beside the records

A mark names what stands there: `main`, `main PRESET` (rows of one preset, without remarks), `learning rates`, `costs`,
`trit shares`, `study NAME`, or `studies`: every study that has no mark of its own in the file.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

from bitdistill.report.markdown import table_section, table_text
from bitdistill.report.study.cells import studies
from bitdistill.report.study.page import SUMMARY_FILE, study_tables, summary_text
from bitdistill.report.study.reading import read_study
from bitdistill.report.study.results import Entry, main_entries
from bitdistill.report.study.tables import main_table
from bitdistill.report.tables import Table

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "benchmarks" / "fidelity"
FILES = (ROOT / "README.md", ROOT / "docs" / "fidelity.md")
MARK = re.compile(
    r"<!-- (?P<name>[^:>\n]+): benchmarks/fidelity_tables\.py -->\n.*?"
    r"<!-- end of (?P=name): benchmarks/fidelity_tables\.py -->",
    re.DOTALL,
)
NOTHING = "Nothing is on file yet."
STUDY = "study "
SINGLE = ("main", "learning rates", "costs", "trit shares")
SEVERAL = ("main ", STUDY)


def read_tables(folder: Path = RECORDS) -> tuple[dict[str, Table], list[Entry]]:
    """All tables by the names of their marks, none where there are no records; and the rows of the main one."""
    records, notes = read_study(folder)
    for note in notes:
        print(note)
    found = studies(records)
    entries, _ = main_entries(found)
    by_preset = {
        f"main {preset}": main_table([entry for entry in entries if entry.preset == preset])
        for preset in dict.fromkeys(entry.preset for entry in entries)
    }
    return study_tables(found, entries) | by_preset, entries


def with_tables(text: str, tables: Mapping[str, Table]) -> str:
    """``text`` with the tables between their marks."""
    own = {match["name"] for match in MARK.finditer(text)}
    rest = [name for name in tables if name.startswith(STUDY) and name not in own]

    def filled(match: re.Match[str]) -> str:
        name = match["name"]
        parts = [_section(tables[study]) for study in rest] if name == "studies" else [_part(name, tables)]
        mark = "<!-- {}: benchmarks/fidelity_tables.py -->"
        return "\n".join((mark.format(name), "\n\n".join(parts) or NOTHING, mark.format(f"end of {name}")))

    return MARK.sub(filled, text)


def _part(name: str, tables: Mapping[str, Table]) -> str:
    if name not in tables:
        if name not in SINGLE and not name.startswith(SEVERAL):
            raise SystemExit(
                f"no table is called {name!r}: use {', '.join(SINGLE)}, main PRESET, study NAME or studies"
            )
        return NOTHING
    return table_text(tables[name]) if name.startswith("main ") else _section(tables[name])


def _section(table: Table) -> str:
    """Table and remarks; a study's under its own heading, others under that of the file."""
    heading, _, rest = table_section(table).partition("\n\n")
    return f"#{heading}\n\n{rest}"


def main() -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    tables, entries = read_tables()
    if not parser.parse_args().write:
        print(*map(_section, tables.values()), sep="\n\n")
        return
    for path in FILES:
        path.write_text(with_tables(path.read_text(encoding="utf-8"), tables), encoding="utf-8")
    (RECORDS / SUMMARY_FILE).write_text(summary_text(entries), encoding="utf-8")


if __name__ == "__main__":
    main()
