"""The tables of docs/bitnet_v2.md, from the records of study.py and the scripts beside it, and of `bitdistill bench`.

python benchmarks/bitnet_v2/tables.py            prints them
python benchmarks/bitnet_v2/tables.py --write    puts them between their marks, and draws curves.svg beside the records
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from study import STATES, VARIANTS

from bitdistill.report.html import drawing
from bitdistill.report.plots import compare

ROOT = Path(__file__).parent
PAGE = ROOT.parent.parent / "docs" / "bitnet_v2.md"
MARK = "<!-- {}: benchmarks/bitnet_v2/tables.py -->"
NOTHING = "Nothing is on file yet."
REFERENCE = "b158"
TAIL_SHOWN = 0.8
"""Where the second chart of the curves begins, as a share of the steps."""

Record = dict[str, Any]


def read_records(pattern: str) -> list[Any]:
    """Records whose path under this folder matches."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob(pattern))]


def mean_sd(values: Sequence[float], digits: int) -> str:
    """``mean ± sample standard deviation``; the value where there is one."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column is text, the others figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by_variant(records: Sequence[Record]) -> dict[str, dict[int, Record]]:
    """Records by variant, in the study's order, and seed."""
    found = {name: {r["seed"]: r for r in records if r["variant"] == name} for name in VARIANTS}
    return {name: of_seeds for name, of_seeds in found.items() if of_seeds}


def from_scratch(records: Sequence[Record]) -> str:
    """Perplexity and accuracy of every variant, and differences to b1.58 within a seed."""
    found = by_variant(records)
    rows = []
    for name, runs in found.items():
        perplexity = {seed: r["perplexity"]["as trained"] for seed, r in runs.items()}
        reference = found.get(REFERENCE, {})
        shared = [seed for seed in runs if seed in reference and name != REFERENCE]
        gaps = [perplexity[s] - reference[s]["perplexity"]["as trained"] for s in shared]
        rows.append(
            [
                name,
                ", ".join(map(str, runs)),
                mean_sd(list(perplexity.values()), 2),
                mean_sd(gaps, 2) if gaps else "",
                mean_sd([100 * r["sst2"]["as trained"] for r in runs.values()], 2),
            ]
        )
    head = ["model", "seed", "held-out perplexity", f"beside {REFERENCE}, same seed", "SST-2, %"]
    return table(head, rows) if rows else NOTHING


def curves(records: Sequence[Record]) -> str | None:
    """Held-out loss of every model's first seed over all steps and over the last of them, as SVG; None without any."""
    found = {name: runs[min(runs)]["heldout"] for name, runs in by_variant(records).items()}
    if not found:
        return None
    end = max(curve["step"][-1] for curve in found.values())
    charts = []
    for title, first in (("Held-out loss, nats", 0.1 * end), ("The last steps", TAIL_SHOWN * end)):
        shown: dict[str, tuple[list[float], list[float]]] = {}
        for name, curve in found.items():
            points = [(x, y) for x, y in zip(curve["step"], curve["loss"], strict=True) if x >= first]
            shown[name] = ([x for x, _ in points], [y for _, y in points])
        charts.append(compare("bitnet-v2", title, shown, is_log=False))
    return drawing(charts)


def low_bit_states(records: Sequence[Record]) -> str:
    """Perplexity and accuracy with attention states of few bits, which nobody trained."""
    names = ["as trained", *STATES]
    rows = []
    for name, runs in by_variant(records).items():
        measures: dict[str, Callable[[Record, str], float]] = {
            f"{name}, perplexity": lambda r, state: r["perplexity"][state],
            f"{name}, SST-2": lambda r, state: 100 * r["sst2"][state],
        }
        for label, value in measures.items():
            rows.append([label, *(mean_sd([value(r, state) for r in runs.values()], 2) for state in names)])
    return table(["model", *names], rows) if rows else NOTHING


def post_training(records: Sequence[Record]) -> str:
    """Perplexity of 4-bit activations after training."""
    if not records:
        return NOTHING
    rows = [
        [name, mean_sd([r["rows"][name]["perplexity"] for r in records], 2)] for name in records[0]["rows"]
    ]
    return table(["weights of 1.58 bits", "held-out perplexity"], rows)


def outliers(records: Sequence[Record]) -> str:
    """Perplexity by base and the outliers' factor."""
    if not records:
        return NOTHING
    kinds = list(dict.fromkeys((row["bits"], row["hadamard"]) for row in records[0]["rows"]))
    found: dict[str, dict[tuple[int, bool], list[float]]] = {}
    for record in records:
        for row in record["rows"]:
            label = f"{Path(record['model']).name}, x {row['factor']:g}"
            of_kind = found.setdefault(label, {}).setdefault((row["bits"], row["hadamard"]), [])
            of_kind.append(row["perplexity"])
    names = [f"A{bits}{', Hadamard' if hadamard else ''}" for bits, hadamard in kinds]
    rows = [[label, *(mean_sd(of_kind[kind], 2) for kind in kinds)] for label, of_kind in found.items()]
    return table(["base, outliers", *names], rows)


def activations(records: Sequence[Record]) -> str:
    """Outliers before o_proj and down_proj, by model, with the transform and without."""
    rows = []
    for r in records:
        for row in r["rows"]:
            where = f"{r['model']}, {row['site']}{', Hadamard' if row['hadamard'] else ''}"
            errors = [f"{100 * row[f'error of {bits} bits']:.1f}" for bits in (8, 4)]
            rows.append([where, f"{row['peak']:.1f}", f"{row['channel']:.1f}", *errors])
    head = ["input", "peak / rms", "largest channel / mean", "error of 8 bits, %", "of 4 bits, %"]
    return table(head, rows) if rows else NOTHING


def in_engine(records: Sequence[Record], torch_records: Sequence[Record]) -> str:
    """What exported models answer in the engine beside what they answer in torch."""
    by_name = {(r["variant"], r["seed"]): r for r in torch_records}
    rows = []
    for r in records:
        torch_record = by_name[r["variant"], r["seed"]]
        for name, there, here, factor in (
            ("perplexity", "perplexity", "perplexity", 1),
            ("SST-2", "sst2", "accuracy", 100),
        ):
            values = []
            for state, cache in (("as trained", "fp32"), ("4-bit KV", "int4")):
                values += [torch_record[there][state], r[here][cache]]
            label = f"{r['variant']}, seed {r['seed']}, {name}"
            rows.append([label, *(f"{factor * value:.2f}" for value in values)])
    head = ["model", "torch", "engine, fp32 cache", "torch, 4-bit KV", "engine, int4 cache"]
    return table(head, rows) if rows else NOTHING


def engine(records: Sequence[Record]) -> str:
    """Speed with 4-bit activations and keys and values beside 8-bit activations and an fp16 cache."""
    if not records:
        return NOTHING
    rows = []
    for r in records:
        versus = r["versus"]
        what = f"{r['phase']} {r['tokens']}"
        if "kv_bytes" in versus:
            share = 100 * r["kv_bytes"] / versus["kv_bytes"]
            what += f" after {r['context']}, {r['kv']} keys and values ({share:.0f} % of the bytes)"
        rows.append(
            [what, str(r["threads"]), f"{r['tok_s']:.0f}", f"{versus['ratio']:.2f}x {versus['name']}"]
        )
    return table(["phase, tokens", "threads", "tokens/s", "in turns with"], rows)


def tables() -> dict[str, str]:
    """All tables by the names of their marks."""
    records = read_records("records/*.json")
    return {
        "from scratch": from_scratch(records),
        "low-bit states": low_bit_states(records),
        "post-training": post_training(read_records("post_training/*.json")),
        "activations": activations(read_records("activations/*.json")),
        "outliers": outliers(read_records("outliers/*.json")),
        "in the engine": in_engine(read_records("in_engine/*.json"), records),
        "engine": engine([record for file in read_records("engine/*.json") for record in file]),
    }


def with_table(text: str, name: str, body: str) -> str:
    """``text`` with a table between its marks."""
    start, end = MARK.format(name), MARK.format(f"end of {name}")
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{PAGE} has no marks {start} and {end}")
    return f"{before}{start}\n{body}\n{end}{after}"


def main() -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    found = tables()
    if not parser.parse_args().write:
        print(*(f"{name}\n\n{body}" for name, body in found.items()), sep="\n\n")
        return
    text = PAGE.read_text(encoding="utf-8")
    for name, body in found.items():
        text = with_table(text, name, body)
    PAGE.write_text(text, encoding="utf-8")
    drawn = curves(read_records("records/*.json"))
    if drawn:
        (ROOT / "curves.svg").write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
