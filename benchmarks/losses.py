"""Peak memory and time of the head's losses: the whole logits (naive) against blocks of tokens (lean). One JSON report.

    python benchmarks/losses.py --batch 4 --sequence 512 --vocabulary 151936 --threads 2 --output losses.json

CE is the loss of stage 2 and of plain fine-tunes, CE+KD that of stage 3 without the relations, here with both on every
token. A step is the forward and the backward pass of the head and its losses, in fp32.

Memory is the high-water mark of the process's resident memory (``ru_maxrss``) over one step, less what is resident
before it, less the weight's gradient; each measured step has a process of its own. A count of the tensors that torch
dispatches would miss the temporaries inside its kernels and matrix products. Times are of both forms in turns in one
process.

``scaled`` extends the peaks to another number of tokens: the naive form's grows with tokens x vocabulary, the lean
form's only by the gradient of the hidden states.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitdistill.train.head_loss import block_linear, head_loss
from bitdistill.train.losses import label_loss, logits_kd

TEMPERATURE = 5.0
LAMBDA = 10.0
FORMS = ("naive", "lean")
LOSSES = ("ce", "ce+kd")
FP32_BYTES = 4


class Problem:
    """Hidden states of student and teacher, their heads and the labels of ``tokens`` tokens."""

    def __init__(self, tokens: int, hidden_size: int, vocabulary: int, *, with_kd: bool) -> None:
        torch.manual_seed(0)
        self.with_kd = with_kd
        self.hidden = torch.randn(tokens, hidden_size).requires_grad_()
        self.labels = torch.randint(vocabulary, (tokens,))
        self.head = nn.Linear(hidden_size, vocabulary, bias=False)
        if with_kd:
            self.teacher_hidden = torch.randn(tokens, hidden_size)
            self.teacher = nn.Linear(hidden_size, vocabulary, bias=False).requires_grad_(False)

    def naive(self, tokens: int) -> Tensor:
        """The loss of the first ``tokens`` tokens, as the equations are written."""
        logits = self.head(self.hidden[:tokens])
        loss = F.cross_entropy(logits, self.labels[:tokens])
        if self.with_kd:
            teacher = self.teacher(self.teacher_hidden[:tokens])
            log_p = F.log_softmax(teacher / TEMPERATURE, dim=-1)
            log_q = F.log_softmax(logits / TEMPERATURE, dim=-1)
            loss = loss + LAMBDA * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        return loss

    def lean(self, tokens: int) -> Tensor:
        """The same in blocks, as the objectives do it."""
        teacher = block_linear(self.teacher) if self.with_kd else None

        def losses(logits: Tensor, rows: slice, *teacher_logits: Tensor) -> Tensor:
            parts = [label_loss(logits, self.labels[rows])]
            parts += [logits_kd(logits, other, temperature=TEMPERATURE) for other in teacher_logits]
            return torch.stack(parts)

        weights = torch.tensor([1.0, LAMBDA][: 1 + self.with_kd]) / tokens
        beside = None if teacher is None else lambda rows: teacher(self.teacher_hidden[rows])
        return head_loss(self.hidden[:tokens], self.head, losses, weights, beside)[0]

    def step(self, form: str, tokens: int | None = None) -> float:
        """Forward and backward pass; the gradients stay."""
        self.hidden.grad = self.head.weight.grad = None
        make: Callable[[int], Tensor] = getattr(self, form)
        loss = make(tokens or len(self.labels))
        loss.backward()
        return loss.item()


def resident_bytes() -> int:
    """Resident memory of this process now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(problem: Problem, form: str) -> dict[str, float]:
    """Peak of one step beyond weights and their gradients, after a step of a few tokens has loaded the kernels."""
    problem.step(form, tokens=8)
    problem.hidden.grad = problem.head.weight.grad = None
    before = resident_bytes()
    loss = problem.step(form)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
    return {"peak_bytes": peak - before - problem.head.weight.nbytes, "loss": loss}


def times_s(problem: Problem, repeats: int) -> dict[str, list[float]]:
    """Seconds of each form's steps, in turns, after one of each that is not counted."""
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    for repeat in range(repeats + 1):
        for form in FORMS:
            started = time.perf_counter()
            problem.step(form)
            if repeat:
                times[form].append(time.perf_counter() - started)
    return times


def in_own_process(options: argparse.Namespace, task: str) -> dict[str, Any]:
    """Run ``task`` ("FORM LOSS" or "times LOSS") of this script in a fresh process."""
    shape = ("batch", "sequence", "hidden", "vocabulary", "threads", "repeats")
    arguments = [word for name in shape for word in (f"--{name}", str(getattr(options, name)))]
    command = [sys.executable, __file__, *arguments, "--task", task]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def work(options: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own does."""
    what, loss = options.task.split()
    tokens = options.batch * options.sequence
    problem = Problem(tokens, options.hidden, options.vocabulary, with_kd=loss == "ce+kd")
    return times_s(problem, options.repeats) if what == "times" else peak_bytes(problem, what)


def compare(options: argparse.Namespace, loss: str) -> dict[str, Any]:
    """Peaks, times and their ratios for one loss."""
    found = {form: in_own_process(options, f"{form} {loss}") for form in FORMS}
    naive, lean = (found[form]["peak_bytes"] for form in FORMS)
    tokens, scaled_tokens = options.batch * options.sequence, options.scaled_batch * options.sequence
    scaled_naive = naive * scaled_tokens / tokens
    scaled_lean = lean + (scaled_tokens - tokens) * options.hidden * FP32_BYTES
    report = {
        "loss": {form: found[form]["loss"] for form in FORMS},
        "peak_bytes": {"naive": naive, "lean": lean},
        "peak_ratio": lean / naive,
        "naive_peak_in_logits": naive / (tokens * options.vocabulary * FP32_BYTES),
        "scaled": {
            "tokens": scaled_tokens,
            "peak_bytes": {"naive": round(scaled_naive), "lean": scaled_lean},
            "peak_ratio": scaled_lean / scaled_naive,
        },
    }
    if options.repeats:
        times = in_own_process(options, f"times {loss}")
        median = {form: statistics.median(times[form]) for form in FORMS}
        report |= {"time_s": times, "median_s": median, "time_ratio": median["lean"] / median["naive"]}
    return report


def processor() -> str:
    """Its name, as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--scaled-batch", type=int, default=32, help="sequences to extend the peaks to")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=LOSSES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each form; 0 times nothing")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.task:
        print(json.dumps(work(options)))
        return
    report = {
        "processor": processor(),
        "torch": torch.__version__,
        **{name: getattr(options, name) for name in ("batch", "sequence", "hidden", "vocabulary", "threads")},
        **{loss: compare(options, loss) for loss in options.losses},
    }
    text = json.dumps(report, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
