"""Median, lowest and highest score of each method over the result.json files of several seeds.

python benchmarks/summarise.py runs/demo-seed*/result.json [--json OUT]
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Per method: scores by seed, median, mean, range, bytes, and the gap to the better full-precision row."""
    methods = [key for key in results[0] if key != "meta"]
    metric = results[0]["meta"].get("metric", "accuracy")  # older results do not name it
    summary: dict[str, Any] = {"seeds": [r["meta"]["seed"] for r in results], "methods": {}}
    for key in methods:
        values = [r[key][metric] for r in results]
        better = [max(r[k][metric] for k in ("fp16_sft", "fp16_ct_sft") if k in r) for r in results]
        summary["methods"][key] = {
            "label": results[0][key]["label"],
            metric: values,
            "median": statistics.median(values),
            "mean": statistics.fmean(values),
            "lowest": min(values),
            "highest": max(values),
            "median_gap_to_better_fp16": statistics.median(
                v - b for v, b in zip(values, better, strict=True)
            ),
            "bytes": results[0][key]["bytes"],
        }
    return summary


def main() -> None:
    """Print the table; write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    summary = summarise([json.loads(p.read_text(encoding="utf-8")) for p in arguments.results])
    print("| method | median | lowest | highest | gap to the better FP16 row | bytes |")
    print("|---|---|---|---|---|---|")
    for row in summary["methods"].values():
        print(
            f"| {row['label']} | {row['median']:.2%} | {row['lowest']:.2%} | {row['highest']:.2%} "
            f"| {100 * row['median_gap_to_better_fp16']:+.2f} | {row['bytes']:,} |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
