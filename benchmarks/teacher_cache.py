"""The teacher cache: step times against a plain fine-tune, bytes per token, and what top-k loses. One JSON report.

    python benchmarks/teacher_cache.py --batch 16 --sequence 128 --response 32 --vocabulary 151936 --output cache.json
    python benchmarks/teacher_cache.py --repeats 0 --teacher T --student S --recipe R.toml --output error.json

Step times are of one ternary student with random weights at the stated shape, a teacher of the same shape, and caches
filled on disk by the package: collating the batch (and reading its rows), forward and backward pass, clipping, AdamW.
The variants take turns within a repeat, on the same batch; their cross-entropy covers the same tokens. Ratios are
medians over the repeats of the ratio to the plain fine-tune (``sft``) of the same repeat.

The error of top-k is that of KL(teacher || student) with the vocabulary beyond the teacher's k likeliest tokens merged
into one, on the training examples of a task: mean over tokens, its share of the full KL, and the distance of the
gradients in the student's logits relative to the full gradient; ``mass`` is the teacher's in its k likeliest.
``hidden`` is the full KL of hidden states rounded to bf16.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from bitdistill.checkpoint import provenance
from bitdistill.config import DistillConfig
from bitdistill.data.prompts import Encoded, PaddedBatch, TaskSequences
from bitdistill.data.tasks import load_task
from bitdistill.data.teacher_rows import RowPlan, TaughtBatch, TaughtSequences, is_of_states
from bitdistill.model import TernarySpec
from bitdistill.recipe import load_recipe
from bitdistill.train.loading import load_model, load_tokenizer
from bitdistill.train.losses import logits_kd, top_k_kd, top_k_log_p
from bitdistill.train.objective import Distillation, LanguageModelling, autocast_dtype, kd_mask
from bitdistill.train.sft import task_sequences
from bitdistill.train.surgery import refine
from bitdistill.train.teacher import CachedTeacher
from bitdistill.train.teacher_cache import CacheFiller, load_head

PAD = 1
FORMS = ("hidden", "topk")


# --- step times ---


def random_sequences(options: argparse.Namespace) -> TaskSequences:
    """Examples of the stated shape; their last ``response`` tokens are the answer."""
    draw = random.Random(0)
    prompt = options.sequence - options.response
    return TaskSequences(
        [
            Encoded(
                *(
                    [draw.randrange(2, options.vocabulary) for _ in range(n)]
                    for n in (prompt, options.response)
                )
            )
            for _ in range(options.examples)
        ]
    )


def random_model(options: argparse.Namespace) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        head_dim=options.head_dim,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=0,
        bos_token_id=None,
        dtype=torch.float32,
    )
    return Qwen3ForCausalLM(config)


def section(options: argparse.Namespace, teacher: Path, form: str, *, relations: bool) -> DistillConfig:
    return DistillConfig(
        teacher=str(teacher),
        teacher_cache=form,  # type: ignore[arg-type]
        gamma_relation=float(relations),
        kd_tokens=options.kd_tokens,
        precision=options.precision,
        **({"cache_top_k": options.top_k} if form == "topk" else {}),
    )


class Variants:
    """Objectives around one student, and what makes their batches."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        teacher = random_model(options)
        teacher.save_pretrained(folder / "teacher")
        self.student = refine(random_model(options), TernarySpec())[0].to(options.device).train()
        self.sequences = random_sequences(options)
        padded = PaddedBatch(PAD)
        self.variants: dict[str, tuple[LanguageModelling, Any, Callable[[list], dict[str, Tensor]]]] = {
            "sft": (LanguageModelling(self.student), self.sequences, padded)
        }
        self.bytes: dict[str, dict[str, float]] = {}
        for relations in (False, True):
            suffix = "+relations" if relations else ""
            config = section(options, folder / "teacher", "none", relations=relations)
            self.variants[f"live{suffix}"] = (
                Distillation(self.student, teacher, config), self.sequences, padded,
            )  # fmt: skip
            for form in FORMS:
                name = f"{form}{suffix}"
                cached, taught = self.cache(options, folder, name, form, relations=relations)
                objective = Distillation(
                    self.student, cached, section(options, folder / "teacher", form, relations=relations)
                )
                self.variants[name] = (objective, taught, TaughtBatch(PAD))

    def cache(
        self, options: argparse.Namespace, folder: Path, name: str, form: str, *, relations: bool
    ) -> tuple[CachedTeacher, TaughtSequences]:
        """Fill a cache as the package does."""
        config = section(options, folder / "teacher", form, relations=relations)
        plan = RowPlan(self.sequences, config.kd_tokens)
        layers = [options.layers - 1] if relations else []
        filler = CacheFiller(config, plan, PAD, layers, options.vocabulary)
        (folder / name).mkdir()
        metrics = filler.fill(folder / name)
        taught = TaughtSequences(plan, folder / name, filler.names)
        rows = taught[0].rows
        sizes = {
            what: sum(x.nbytes for n, x in rows.items() if is_of_states(n) == of_states)
            / (options.sequence if of_states or options.kd_tokens == "all" else options.response)
            for what, of_states in (("per_kd_token", False), ("per_token", True))
        }
        on_disk = sum(path.stat().st_size for path in (folder / name).glob("shard-*"))
        self.bytes[name] = sizes | {"shards_per_token": on_disk / metrics["tokens"]}
        head = load_head(folder / name) if form == "hidden" else None
        return CachedTeacher(head, options.vocabulary, options.layers, config.temperature), taught


def step_times(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of each variant's steps, in turns, and their ratios to ``sft``."""
    made = Variants(options, folder)
    optimizer = torch.optim.AdamW(made.student.parameters(), lr=1e-5, fused=True)
    dtype = autocast_dtype(options.precision)
    order = random.Random(1)
    times: dict[str, list[float]] = {name: [] for name in made.variants}
    ce_tokens: dict[str, int] = {}
    for repeat in range(options.warmup + options.repeats):
        indices = [order.randrange(options.examples) for _ in range(options.batch)]
        names = list(made.variants)
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            objective, source, collate = made.variants[name]
            synchronize(options)
            started = time.perf_counter()
            batch = {key: x.to(options.device) for key, x in collate([source[i] for i in indices]).items()}
            totals = objective.counts(batch)
            autocast = (
                contextlib.nullcontext() if dtype is None else torch.autocast(options.device, dtype=dtype)
            )
            with autocast:
                loss = objective(**batch, totals=totals)["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(made.student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            synchronize(options)
            ce_tokens[name] = int(totals[0])
            if repeat >= options.warmup:
                times[name].append(time.perf_counter() - started)
    assert len(set(ce_tokens.values())) == 1
    shape = (
        "batch", "sequence", "response", "kd_tokens", "hidden", "intermediate", "layers", "heads", "kv_heads",
        "head_dim", "vocabulary", "top_k", "precision", "threads", "device",
    )  # fmt: skip
    return {
        "shape": {name: getattr(options, name) for name in shape}
        | {
            "compute": str(dtype or torch.float32),
            "ce_tokens": ce_tokens["sft"],
            "parameters": sum(p.numel() for p in made.student.parameters()),
        },
        "bytes": made.bytes,
        "time_s": times,
        "median_s": {name: statistics.median(values) for name, values in times.items()},
        "ratio_to_sft": {
            name: statistics.median(a / b for a, b in zip(values, times["sft"], strict=True))
            for name, values in times.items()
        },
    }


def synchronize(options: argparse.Namespace) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


# --- what top-k loses ---


def kl_error(options: argparse.Namespace) -> dict[str, Any]:
    """KL of top-k and of rounded hidden states against the full KL, of real models on real examples."""
    recipe = load_recipe(options.recipe, options.set or ())
    tokenizer = load_tokenizer(options.teacher)
    sequences = task_sequences(recipe, load_task(recipe.task), tokenizer)
    models = [load_model(source).eval() for source in (options.teacher, options.student)]
    padded = PaddedBatch(tokenizer.pad_token_id)
    parts: list[list[Tensor]] = [[], []]
    with torch.no_grad():
        for start in range(0, min(options.examples, len(sequences)), options.batch):
            stop = min(start + options.batch, options.examples, len(sequences))
            batch = padded([sequences[index] for index in range(start, stop)])
            chosen = kd_mask(options.kd_tokens, batch["labels"], batch["attention_mask"])
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            for model, part in zip(models, parts, strict=True):
                part.append(model.base_model(**inputs).last_hidden_state[chosen])
        hidden_t, hidden_s = (torch.cat(part) for part in parts)
        head_t, head_s = (model.get_output_embeddings() for model in models)
        teacher, rounded, student = head_t(hidden_t), head_t(hidden_t.bfloat16().float()), head_s(hidden_s)
    vocabulary = min(teacher.shape[1], student.shape[1])
    teacher, rounded, student = (x[:, :vocabulary].double() for x in (teacher, rounded, student))
    rows = []
    for temperature in options.temperatures:
        full = loss_and_gradient(student, lambda x, tau=temperature: logits_kd(x, teacher, temperature=tau))
        forms = {"hidden": lambda x, tau=temperature: logits_kd(x, rounded, temperature=tau)}
        mass = {"hidden": 1.0}
        for k in options.ks:
            top, log_p, rest = top_k_log_p(teacher, k, temperature=temperature)
            mass[f"k={k}"] = float(log_p.exp().sum(dim=-1).mean())
            stored = (top, log_p.half().double(), rest.float().double())
            forms[f"k={k}"] = lambda x, s=stored, tau=temperature: top_k_kd(x, *s, temperature=tau)
        for name, form in forms.items():
            kl, gradient = loss_and_gradient(student, form)
            rows.append(
                {
                    "temperature": temperature,
                    "form": name,
                    "mass": mass[name],
                    "kl": kl / len(student),
                    "full_kl": full[0] / len(student),
                    "kl_error_frac": (kl - full[0]) / full[0],
                    "gradient_error_frac": float((gradient - full[1]).norm() / full[1].norm()),
                }
            )
    return {
        "teacher": str(options.teacher), "student": str(options.student), "task": recipe.task.name,
        "kd_tokens": options.kd_tokens, "tokens": len(student), "vocabulary": vocabulary, "rows": rows,
    }  # fmt: skip


def loss_and_gradient(student: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
    leaf = student.clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.item(), gradient


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sequence", type=int, default=128, help="tokens of an example")
    parser.add_argument("--response", type=int, default=32, help="of them the answer's, which the CE covers")
    parser.add_argument("--kd-tokens", choices=("response", "all"), default="response")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=3072)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--top-k", type=int, default=DistillConfig.cache_top_k)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--examples", type=int, default=64, help="in the caches, or to measure the KL on")
    parser.add_argument("--warmup", type=int, default=2, help="repeats that are not counted")
    parser.add_argument("--repeats", type=int, default=9, help="steps of each variant; 0 times nothing")
    parser.add_argument(
        "--work", type=Path, help="where the caches lie meanwhile; a temporary folder by default"
    )
    parser.add_argument("--teacher", type=Path, help="fine-tuned teacher: measure the KL of top-k")
    parser.add_argument("--student", type=Path, help="student to hold against it")
    parser.add_argument("--recipe", type=Path, help="recipe with the task")
    parser.add_argument("--set", action="append", help="override of the recipe, section.key=value")
    parser.add_argument("--ks", type=int, nargs="+", default=[8, 16, 64, 256, 1024])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 5.0])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    given = [options.teacher, options.student, options.recipe]
    if any(given) and not all(given):
        parser.error("the KL needs --teacher, --student and --recipe")
    report: dict[str, Any] = provenance()
    if options.repeats:
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            report["steps"] = step_times(options, Path(folder))
    if all(given):
        report["kl"] = kl_error(options)
    text = json.dumps(report, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
