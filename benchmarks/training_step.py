"""Time of a ternary training step against the dense step of the same model, in turns in one process. One JSON report.

    python benchmarks/training_step.py --shape qwen3-0.6b-4l --threads 2 --output step.json
    python benchmarks/training_step.py --shape qwen3-0.6b --device cuda --compile --output step_gpu.json

A step is what stage 2 does: forward and backward pass of the language-modelling objective, clipping and fused AdamW,
latents in fp32, products in the precision of autocast. ``ternary`` has SubLN norms, ternary weights and INT8 activations.
"""

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from bitdistill.checkpoint import provenance
from bitdistill.model import TernarySpec
from bitdistill.train.objective import LanguageModelling, autocast_dtype
from bitdistill.train.surgery import refine

QWEN3 = {"head_dim": 128, "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True}
WIDE = QWEN3 | {"hidden_size": 1024, "intermediate_size": 3072}
SHAPES = {
    "5m": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "tie_word_embeddings": True,
        "vocab_size": 8192,
    },
    "qwen3-0.6b-4l": WIDE | {"num_hidden_layers": 4, "vocab_size": 8192},
    "qwen3-0.6b": WIDE | {"num_hidden_layers": 28, "vocab_size": 151936},
}
"""The demo-sized base, four layers of Qwen3-0.6B with a small vocabulary, and the whole of it."""


class Run:
    """One model with its optimizer."""

    def __init__(self, options: argparse.Namespace, *, ternary: bool) -> None:
        torch.manual_seed(0)
        config = Qwen3Config(**SHAPES[options.shape], dtype=torch.float32, use_cache=False)
        model = Qwen3ForCausalLM(config)
        if ternary:
            model, _ = refine(model, TernarySpec())
        self.objective = LanguageModelling(model.to(options.device).train())
        self.forward = torch.compile(self.objective) if options.compile else self.objective
        self.optimizer = torch.optim.AdamW(self.objective.parameters(), lr=1e-4, fused=True)
        self.device, self.precision = options.device, options.precision

    def step(self, input_ids: torch.Tensor) -> float:
        """Seconds of one optimizer step."""
        dtype = autocast_dtype(self.precision)
        autocast = torch.autocast(self.device, dtype) if dtype else nullcontext()
        totals = self.objective.counts({"labels": input_ids})
        self._synchronize()
        started = time.perf_counter()
        with autocast:
            loss = self.forward(totals=totals, input_ids=input_ids, labels=input_ids)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.objective.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._synchronize()
        return time.perf_counter() - started

    def _synchronize(self) -> None:
        if self.device != "cpu":
            torch.accelerator.synchronize()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b-4l")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile both")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each, after two that are not")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    runs = {name: Run(options, ternary=name == "ternary") for name in ("dense", "ternary")}
    vocabulary = SHAPES[options.shape]["vocab_size"]
    input_ids = torch.randint(vocabulary, (options.batch, options.sequence), device=options.device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(options.repeats + 2):
        for name, run in runs.items():
            seconds = run.step(input_ids)
            if repeat >= 2:
                times[name].append(seconds)
    pairs = [ternary / dense for dense, ternary in zip(times["dense"], times["ternary"], strict=True)]
    report = {
        **{name: value for name, value in vars(options).items() if name != "output"},
        "compute": str(autocast_dtype(options.precision) or torch.float32),
        "step_s": times,
        "median_s": {name: statistics.median(values) for name, values in times.items()},
        "ratio": statistics.median(pairs),
        "ratios": pairs,
        **provenance(),
    }
    text = json.dumps(report, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
