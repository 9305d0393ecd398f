"""The README's tables of speed and memory, from the records that `bitdistill bench` wrote.

python benchmarks/engine_tables.py            prints them
python benchmarks/engine_tables.py --write    puts them into README.md
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "benchmarks" / "engine"
README = ROOT / "README.md"
NAMES = {"bitnet-2b4t": "BitNet-2B4T", "qwen3-0.6b": "Qwen3-0.6B"}
MARK = "<!-- {name}: benchmarks/engine_tables.py -->"

Record = dict[str, Any]


def read_records(folder: Path = RECORDS) -> list[Record]:
    """All records, in the order of the files' names."""
    return [record for path in sorted(folder.glob("*.json")) for record in json.loads(path.read_text())]


def speed_table(records: list[Record]) -> str:
    """One row for each shape, form of the head and phase; what was measured in two runs stands side by side."""
    rows: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if (record["phase"] in ("prefill", "decode") and record["tokens"] != 128) or record[
            "phase"
        ] == "decode":
            screened = ", screened" if record["screening"] else ""
            key = (record["shape"], f"{record['head_bits']}-bit{screened}", record["phase"], record["batch"])
            rows.setdefault(key, []).append(record)
    lines = [
        "| shape | head | phase | tokens/s | share of the roofline | in turns with |",
        "|---|---|---|---|---|---|",
    ]
    for (shape, head, phase, batch), found in rows.items():
        unit = "int8 multiply-adds" if phase == "prefill" else "memory bandwidth"
        versus = [r["versus"] for r in found if r["versus"]]
        tokens = found[0]["tokens"]
        what = f"{phase} {tokens}" + (f", {batch} texts" if batch > 1 else "")
        speeds = ", ".join(f"{r['tok_s']:.0f}" for r in found)
        shares = ", ".join(f"{100 * r['roofline_share']:.0f}" for r in found)
        peers = ", ".join(
            f"{v['ratio']:.1f}x {' '.join(filter(None, (v['name'], v['format'])))}" for v in versus
        )
        share = "" if batch > 1 else f"{shares} % of {unit}"
        lines.append(f"| {NAMES[shape]} | {head} | {what} | {speeds} | {share} | {peers} |")
    return "\n".join(lines)


def memory_table(records: list[Record]) -> str:
    """What a text of 512 tokens takes: the last record of a file's longest text."""
    lines = [
        "| shape | head, keys and values | weights | keys and values | whole process | load to first token |",
        "|---|---|---|---|---|---|",
    ]
    loads = {(r["shape"], r["head_bits"]): r["first_token_s"] for r in records if r["phase"] == "load"}
    seen = set()
    for r in records:
        key = (r["shape"], r["head_bits"], r["kv"], r["phase"])
        if r["phase"] not in ("prefill", "classify") or r["tokens"] != 512 or r["screening"] or key in seen:
            continue
        seen.add(key)
        name = NAMES[r["shape"]] + (", labels alone, 32k vocabulary" if r["phase"] == "classify" else "")
        load = loads.get((r["shape"], r["head_bits"])) if r["phase"] == "prefill" else None
        lines.append(
            f"| {name} | {r['head_bits']}-bit, {r['kv']} | {_mb(r['weight_bytes'])} | {_mb(r['kv_bytes'])} "
            f"| {_mb(r['peak_rss_bytes'])} | {'' if load is None else f'{load:.2f} s'} |"
        )
    return "\n".join(lines)


def _mb(count: int) -> str:
    return f"{count / 1e6:.0f} MB"


def with_tables(text: str, records: list[Record]) -> str:
    """``text`` with the tables between their marks."""
    for name, table in (("speed", speed_table(records)), ("memory", memory_table(records))):
        begin, end = MARK.format(name=name), MARK.format(name=f"end of {name}")
        pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"README.md has no {begin} ... {end}")
        text = pattern.sub(lambda _, b=begin, t=table, e=end: f"{b}\n{t}\n{e}", text)
    return text


def main() -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    records = read_records()
    if parser.parse_args().write:
        README.write_text(with_tables(README.read_text(encoding="utf-8"), records), encoding="utf-8")
        return
    print(speed_table(records), memory_table(records), sep="\n\n")


if __name__ == "__main__":
    main()
