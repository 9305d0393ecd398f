"""A model of study.py, exported, in the engine: one JSON record of what it answers there.

    python benchmarks/bitnet_v2/in_engine.py --seed 0 --variant v2-a4

Held-out perplexity and SST-2 with keys and values of fp32 and of four bits. Embedding and head are exported as they
are (f32), so that what differs from torch is the engine's arithmetic alone.
"""

import argparse
from pathlib import Path
from typing import Any

from study import RECIPE, RUNS, VARIANTS, bitdistill, judged

from bitdistill.checkpoint import provenance, write_json

ROOT = Path(__file__).parent
CACHES = ("fp32", "int4")


def record(variant: str, seed: int) -> dict[str, Any]:
    """Export the base and its fine-tune, and judge both."""
    name = f"{variant}_s{seed}"
    folder = RUNS / name
    settings = ("--set", f"name={name}", "--set", f"seed={seed}")
    found: dict[str, Any] = {"variant": variant, "seed": seed}
    for what, step, words in (("perplexity", "base", ["--perplexity"]), ("accuracy", "sst2", [])):
        packed = folder / f"{step} packed"
        bitdistill("export", folder / step, packed, "--head", "f32", "--embedding", "f32")
        found[what] = {}
        for cache in CACHES:
            path = folder / f"{step} engine {cache}.json"
            report = judged(path, RECIPE, packed, "--engine", "--kv-cache", cache, *words, *settings)
            found[what][cache] = report[what]
    return found | provenance()


def main() -> None:
    """The record of one model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--variant", choices=VARIANTS, default="v2-a4")
    options = parser.parse_args()
    path = ROOT / "in_engine" / f"{options.variant}_s{options.seed}.json"
    write_json(path, record(options.variant, options.seed))


if __name__ == "__main__":
    main()
