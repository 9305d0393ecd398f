"""BitNet b1.58, a4.8 and v2 from scratch on the same text, tokens and seeds: one JSON record of every model.

    python benchmarks/bitnet_v2/study.py --seed 0            # resumable; one process for each seed or variant
    python benchmarks/bitnet_v2/study.py --seed 0 --variant v2-a8 v2-a4

Of every model: held-out perplexity (also with attention states of few bits, which it was not trained with), accuracy
on SST-2 after a fine-tune, and the curve of its held-out loss. Needs data/ (benchmarks/real_input/prepare.py).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bitdistill.checkpoint import provenance, write_json

ROOT = Path(__file__).parent
RECIPE = "recipes/bitnet_v2_study.toml"
RUNS = Path("runs/bitnet_v2")

B158 = ["base.hadamard_block=1"]  # H_1 = [1]: the same model without the transform
VARIANTS = {
    "b158": [*B158, "base.int4_activations_ratio=0"],
    "b158-a4": B158,
    "b158-a4-throughout": [*B158, "base.int4_activations_ratio=1"],
    "a4.8": ['base.architecture="bitnet_a4_8"'],
    "v2-a8": ["base.int4_activations_ratio=0"],
    "v2-a4": [],
    "v2-a4-throughout": ["base.int4_activations_ratio=1"],
}
"""Settings of the recipe by variant; the recipe itself is v2-a4."""
STATES = {
    "4-bit KV": ["--kv-bits", "4"],
    "4-bit QKV": ["--query-bits", "4", "--kv-bits", "4"],
    "4-bit Q, 3-bit KV": ["--query-bits", "4", "--kv-bits", "3"],
}
"""The columns of the paper's tables 2 and 3."""


class Failed(Exception):
    """A verb of a variant ended with an error."""


def bitdistill(*words: object) -> None:
    """Run a verb of the command line."""
    command = [sys.executable, "-m", "bitdistill", *map(str, words)]
    if subprocess.run(command, check=False).returncode:
        raise Failed(" ".join(command[2:]))


def judged(path: Path, *words: object) -> dict[str, Any]:
    """What ``bitdistill eval`` finds, written to ``path``."""
    bitdistill("eval", *words, "--json", path)
    return dict(json.loads(path.read_text(encoding="utf-8")))


def heldout_curve(folder: Path) -> dict[str, list[float]]:
    """Steps and held-out losses of a base."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [(line["step"], line["heldout/loss"]) for line in lines if "heldout/loss" in line]
    return {"step": [step for step, _ in found], "loss": [loss for _, loss in found]}


def record(variant: str, seed: int, changes: list[str]) -> dict[str, Any]:
    """Train and judge one model."""
    name = f"{variant}_s{seed}"
    settings = [word for value in (f"name={name}", f"seed={seed}", *changes) for word in ("--set", value)]
    folder = RUNS / name
    base, tuned = folder / "base", folder / "sst2"
    bitdistill("base", RECIPE, *settings)
    perplexity = {"as trained": judged(folder / "perplexity.json", RECIPE, base, "--perplexity", *settings)}
    for name, words in STATES.items():
        path = folder / f"perplexity {name}.json"
        perplexity[name] = judged(path, RECIPE, base, "--perplexity", *words, *settings)
    bitdistill("sft", RECIPE, "--source", base, "--output", tuned, *settings)
    accuracy = {"as trained": judged(folder / "sst2.json", RECIPE, tuned, *settings)}
    for name, words in STATES.items():
        accuracy[name] = judged(folder / f"sst2 {name}.json", RECIPE, tuned, *words, *settings)
    run = json.loads((base / "run.json").read_text(encoding="utf-8"))
    return {
        "variant": variant,
        "seed": seed,
        "settings": changes,
        "perplexity": {name: found["perplexity"] for name, found in perplexity.items()},
        "sst2": {name: found["accuracy"] for name, found in accuracy.items()},
        "sst2_stderr": accuracy["as trained"]["stderr"],
        "heldout": heldout_curve(base),
        "training": run["settings"]["training"],
        "time_s": run["metrics"]["train_time_s"],
    } | provenance()


def main() -> None:
    """Every variant of one seed that has no record yet; one that fails does not keep the others from their turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--set", dest="more", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--records", type=Path, default=ROOT / "records")
    options = parser.parse_args()
    failed = []
    for variant in options.variant:
        path = options.records / f"{variant}_s{options.seed}.json"
        settings = [*VARIANTS[variant], *options.more]
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))["settings"]
            if found != settings:
                sys.exit(
                    f"error: {path} was made with {found}, not {settings}; give other --records, or delete it"
                )
            continue
        try:
            write_json(path, record(variant, options.seed, settings))
        except Failed as error:  # a divergence is told by the verb itself
            failed.append(f"{variant}: {error}")
    if failed:
        sys.exit("failed: " + "\n        ".join(failed))


if __name__ == "__main__":
    main()
