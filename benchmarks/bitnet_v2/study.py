"""BitNet b1.58, a4.8 and v2 from scratch on the same text, tokens and seeds: one JSON record of every model.

    python benchmarks/bitnet_v2/study.py --seed 0            # resumable; one process for each seed or variant
    python benchmarks/bitnet_v2/study.py --seed 0 --variant v2-a8 v2-a4

A variant whose 4 bits come in the last 5 % is the one with 8 bits up to there: it goes on from a copy of that one's
checkpoint, optimizer state and all, where the recipe's own settings train both in one call.

Of every model: held-out perplexity (also with attention states of few bits, which it was not trained with), accuracy
on SST-2 after a fine-tune, and the curve of its held-out loss. Needs data/ (benchmarks/real_input/prepare.py).
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
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
TAIL_OF = {"b158": "b158-a4", "v2-a8": "v2-a4"}
"""A variant with 8 bits -> the one that leaves it at SWITCH."""
TAIL, SWITCH = 0.05, 2850
"""Share of the steps with 4 bits, and the step that they begin at."""
STATES = {
    "4-bit KV": ["--kv-bits", "4"],
    "4-bit QKV": ["--query-bits", "4", "--kv-bits", "4"],
    "4-bit Q, 3-bit KV": ["--query-bits", "4", "--kv-bits", "3"],
}
"""The columns of the paper's tables 2 and 3."""


class Failed(Exception):
    """A verb of a variant ended with an error."""


def command(*words: object) -> list[str]:
    """A verb of the command line."""
    return [sys.executable, "-m", "bitdistill", *map(str, words)]


def bitdistill(*words: object) -> None:
    """Run a verb to its end."""
    if subprocess.run(command(*words), check=False).returncode:
        raise Failed(" ".join(map(str, words)))


def pretrain(folder: Path, settings: list[str], tail: Path | None) -> None:
    """Train a base; ``tail``, the folder of the variant that leaves it, gets its checkpoint at SWITCH."""
    shards = folder / "shards"  # the tokenised text is the same for all
    if not shards.is_symlink():
        (RUNS / "shards").mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        shards.symlink_to(Path("..") / "shards", target_is_directory=True)
    words = ("base", RECIPE, *settings)
    process = subprocess.Popen(command(*words))
    try:
        while process.poll() is None:
            time.sleep(1)
            if tail is not None and hand_over(folder / "base.partial", tail / "base.partial"):
                tail = None
    finally:
        process.terminate()
    if process.returncode:
        raise Failed(" ".join(words))


def hand_over(source: Path, target: Path) -> bool:
    """Copy an unfinished base's checkpoint at SWITCH and its log to where another goes on; whether it is there."""
    checkpoint = Path("trainer") / f"checkpoint-{SWITCH}"
    if (target / checkpoint).exists() or target.with_suffix("").exists():
        return True
    try:  # Trainer writes its state last
        json.loads((source / checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    run = json.loads((source / "run.json").read_text(encoding="utf-8"))
    run["settings"]["training"]["int4_activations_ratio"] = TAIL  # all else is compared when the tail begins
    shutil.rmtree(target, ignore_errors=True)
    (target / "trainer").mkdir(parents=True)
    write_json(target / "run.json", run)
    shutil.copy(source / "metrics.jsonl", target)
    half = target / "trainer" / "copying"
    shutil.copytree(source / checkpoint, half)
    half.rename(target / checkpoint)
    return True


def judged(path: Path, *words: object) -> dict[str, Any]:
    """What ``bitdistill eval`` finds, written to ``path``."""
    bitdistill("eval", *words, "--json", path)
    return dict(json.loads(path.read_text(encoding="utf-8")))


def heldout_curve(folder: Path) -> dict[str, list[float]]:
    """Steps and held-out losses of a base."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [(line["step"], line["heldout/loss"]) for line in lines if "heldout/loss" in line]
    return {"step": [step for step, _ in found], "loss": [loss for _, loss in found]}


def record(variant: str, seed: int, changes: list[str], tail: str | None) -> dict[str, Any]:
    """Train and judge one model; ``tail``, the variant that goes on from it."""
    settings = [
        word for value in (f"name={variant}_s{seed}", f"seed={seed}", *changes) for word in ("--set", value)
    ]
    folder = RUNS / f"{variant}_s{seed}"
    base, tuned = folder / "base", folder / "sst2"
    pretrain(folder, settings, RUNS / f"{tail}_s{seed}" if tail else None)
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
            tail = TAIL_OF.get(variant)
            is_next = tail in options.variant and not options.more  # SWITCH counts the recipe's own steps
            write_json(path, record(variant, options.seed, settings, tail if is_next else None))
        except Failed as error:  # a divergence is told by the verb itself
            failed.append(f"{variant}: {error}")
    if failed:
        sys.exit("failed: " + "\n        ".join(failed))


if __name__ == "__main__":
    main()
