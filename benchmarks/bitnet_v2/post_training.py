"""Post-training quantisation of a trained BitNet b1.58 to 4-bit activations, as in table 4 of BitNet v2: a JSON report.

    python benchmarks/bitnet_v2/post_training.py recipe.toml runs/name/base --output post_training.json

Held-out perplexity of the recipe's corpus for the model as it is, with 4-bit activations and nothing else, and with
QuaRot's and SpinQuant's rotations, fused into the weights and not (src/bitdistill/train/rotation.py says what that
means). SpinQuant learns its matrices on ``--sequences`` sequences of the stage-2 text.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from bitdistill.checkpoint import provenance, write_json
from bitdistill.config import Recipe
from bitdistill.data.corpus import PackedSequences, build_shards, collate_packed
from bitdistill.errors import BitDistillError
from bitdistill.evaluate import TorchScorer
from bitdistill.pipeline import heldout_sequences
from bitdistill.recipe import load_recipe
from bitdistill.train.loading import load_model, load_tokenizer
from bitdistill.train.rotation import rotate
from bitdistill.train.spinquant import learn_rotations

BATCH = 8
"""Sequences of a calibration batch."""


def calibration(recipe: Recipe, tokenizer: Any, count: int) -> list[dict[str, Any]]:
    """The first sequences of the stage-2 text."""
    shards = build_shards(recipe.corpus, "pretrain", tokenizer, recipe.shards_dir)
    sequences = PackedSequences(shards, recipe.corpus.sequence_length)
    count = min(count, len(sequences))
    return [
        collate_packed([sequences[i] for i in range(start, min(start + BATCH, count))])
        for start in range(0, count, BATCH)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument(
        "model", help="A student of 8-bit activations without Hadamard transforms, or a native BitNet."
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--seed", type=int, default=0, help="Of the signs of the Hadamard matrices.")
    parser.add_argument("--steps", type=int, default=100, help="SpinQuant's steps.")
    parser.add_argument("--learning-rate", type=float, default=1.5, help="SpinQuant's learning rate.")
    parser.add_argument("--sequences", type=int, default=800, help="Sequences that SpinQuant learns on.")
    options = parser.parse_args()

    recipe = load_recipe(options.recipe, options.overrides)
    tokenizer = load_tokenizer(options.model)
    model = load_model(options.model).eval()
    heldout = heldout_sequences(recipe, tokenizer)
    rows: dict[str, Any] = {}

    def judge(name: str, judged: Any, **facts: Any) -> None:
        rows[name] = {"perplexity": TorchScorer(judged, tokenizer).perplexity(heldout), **facts}
        print(f"{name:<24} {rows[name]['perplexity']:.3f}", flush=True)

    judge("as trained", model)
    for kind in ("quarot", "spinquant"):
        for fused in (False, True):
            name = f"{kind} {'fused' if fused else 'not fused'}"
            rotated, rotations, quantisers = rotate(model, kind=kind, fused=fused, seed=options.seed)
            facts: dict[str, Any] = {}
            if kind == "spinquant":
                batches = calibration(recipe, tokenizer, options.sequences)
                facts["calibration_losses"] = learn_rotations(
                    rotated, rotations, batches, steps=options.steps, learning_rate=options.learning_rate
                )
            judge(name, rotated, **facts)
            if kind == "quarot":
                quantisers.activation_bits = 16
                judge(f"{name}, A16", rotated)
    for linear in (m for m in model.modules() if hasattr(m, "spec")):
        linear.spec = type(linear.spec)(**linear.spec.to_dict() | {"activation_bits": 4})
    judge("A4", model)
    write_json(
        options.output,
        {
            "model": str(options.model),
            "seed": options.seed,
            "steps": options.steps,
            "learning_rate": options.learning_rate,
            "sequences": min(options.sequences, options.steps * BATCH),
            "heldout_tokens": len(heldout) * recipe.corpus.sequence_length,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "rows": rows,
            **provenance(),
        },
    )
    print(json.dumps({name: round(row["perplexity"], 3) for name, row in rows.items()}))


if __name__ == "__main__":
    try:
        main()
    except BitDistillError as error:
        sys.exit(f"error: {error}")
