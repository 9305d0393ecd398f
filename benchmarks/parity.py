"""How near the engine is to torch: trits, activation codes, greedy text. One JSON report.

    python benchmarks/parity.py STUDENT PROMPTS.txt --tokens 64 --recipe RECIPE.toml --task --output parity.json

The student is exported with float tables and run in exact mode. Trits must be the same and at least 99.9 % of the
activation codes, each layer of torch being given the states that the engine's layer was given: otherwise one value that
rounds to the other side of a tie moves every later one, and the count says where the first tie lay. (What is equal
without that is reported beside it.) Where a greedy text leaves torch's, torch's own two best logits are nearer than
TOLERANCE at the first such token, or the script fails.

With a recipe, also its held-out text: perplexities must agree to 0.1 %. With ``--task`` the test items of its task: a
decision that differs must be one where torch's two best labels are nearer than LABEL_TOLERANCE.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bitdistill import Engine, layout
from bitdistill.config import Recipe
from bitdistill.data.prompts import PromptEncoder
from bitdistill.data.tasks import load_task
from bitdistill.engine import EngineScorer
from bitdistill.evaluate import TorchScorer
from bitdistill.export import export, ternary_of
from bitdistill.model.quant import quantize_int4, quantize_int8
from bitdistill.packed import read_header
from bitdistill.pipeline import heldout_sequences
from bitdistill.recipe import load_recipe
from bitdistill.train.loading import load_model, load_tokenizer

TOLERANCE = 0.02
"""Of the top-2 margin, in standard deviations of the logits: an activation code that falls on the other side of a tie
moves logits by about this much."""
LABEL_TOLERANCE = 0.05
"""Of the margin between the log-likelihoods of two labels, in nats."""
LEAST_CODES = 0.999
PERPLEXITY_TOLERANCE = 1e-3


def differing_trits(model: nn.Module, packed: Path) -> int:
    """Trits of the file, read with the numpy codec, that are not the torch student's."""
    path = packed / "model.safetensors"
    entries, different = read_header(path), 0
    for name, module in model.named_modules():
        ternary = ternary_of(module) if isinstance(module, nn.Linear) else None
        if ternary is None:
            continue
        entry = entries[f"{name}.weight"]
        data = np.fromfile(path, np.uint8, entry.nbytes, offset=entry.offset).reshape(entry.shape)
        code = layout.unpack(data, *module.weight.shape, ternary.block_size)
        different += int((code != ternary.code.numpy()).sum())
    return different


def torch_codes(
    model: nn.Module, ids: Sequence[int], states: Mapping[str, np.ndarray] | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits ``[T, V]`` and the activation codes ``[T, K]`` that each ternary linear of the torch student sees.

    ``states``: outputs ``[T, H]`` of layers by name; given, they go into the next layer in place of its own input.
    """
    codes: dict[str, np.ndarray] = {}

    def enter(previous: str) -> Callable[[Any, tuple], tuple]:
        def hook(_module: Any, inputs: tuple) -> tuple:
            assert states is not None
            return (torch.from_numpy(states[previous])[None], *inputs[1:])

        return hook

    def watch(name: str) -> Callable[[Any, tuple], None]:
        def hook(module: Any, inputs: tuple) -> None:
            x = inputs[0][0]
            if hasattr(module, "online_quant"):  # transformers multiplies by the reciprocal
                code = (x * (127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5))).round().clamp(-128, 127)
            else:
                quantize = quantize_int4 if module.spec.activation_bits == 4 else quantize_int8
                code = quantize(module.inputs(x))[0]
            codes[name] = code.numpy().astype(np.int8)

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ternary_of(module) is not None
    ]
    if states is not None:
        layers = model.get_submodule("model.layers")
        handles += [
            layer.register_forward_pre_hook(enter(f"model.layers.{i}"))
            for i, layer in enumerate(list(layers.children())[1:])
        ]
    # transformers' BitNet layers compile themselves; the results are the same without.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        logits = model(torch.tensor([list(ids)])).logits[0].numpy()
    for handle in handles:
        handle.remove()
    return logits, codes


def differing_codes(codes: Mapping[str, np.ndarray], taps: Mapping[str, np.ndarray]) -> int:
    """Activation codes of torch that the engine's taps do not share."""
    return sum(int((taps[f"{name}.code"] != code).sum()) for name, code in codes.items())


def first_divergence(model: Any, engine: Engine, ids: list[int], tokens: int) -> dict[str, Any] | None:
    """Where the engine's greedy text leaves torch's: the step, both tokens, torch's margin between its two best."""
    ours = engine.generate(ids, max_new_tokens=tokens).tokens
    text = list(ids)
    for step in range(tokens):
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            logits = model(torch.tensor([text])).logits[0, -1]
        top = logits.topk(2)
        theirs = int(top.indices[0])
        if theirs in engine.stop_tokens:
            return None if step == len(ours) else _divergence(step, ours, theirs, logits, top)
        if step >= len(ours) or ours[step] != theirs:
            return _divergence(step, ours, theirs, logits, top)
        text.append(theirs)
    return None


def _divergence(step: int, ours: list[int], theirs: int, logits: Any, top: Any) -> dict[str, Any]:
    margin = float((top.values[0] - top.values[1]) / logits.std())
    return {
        "step": step,
        "engine": ours[step] if step < len(ours) else None,
        "torch": theirs,
        "margin": margin,
    }


def text_parity(recipe: Recipe, model: Any, tokenizer: Any, engine: Engine) -> dict[str, Any]:
    """Perplexity of the held-out text."""
    sequences = heldout_sequences(recipe, tokenizer)
    rows = [sequences[i]["input_ids"].tolist() for i in range(len(sequences))]
    return {
        "tokens": sum(len(row) - 1 for row in rows),
        "torch": TorchScorer(model, tokenizer).perplexity(sequences),
        "engine": EngineScorer(engine).perplexity(rows),
    }


def task_parity(recipe: Recipe, model: Any, tokenizer: Any, engine: Engine) -> dict[str, Any]:
    """Decisions on the test items of a classification task."""
    task = load_task(recipe.task)
    encoder = PromptEncoder(tokenizer, recipe.task.max_length)
    labels = [encoder.answer(label) for label in task.labels]
    prompts = encoder.prompts(task.test, max(map(len, labels)))
    requests = [(prompt, ids) for prompt in prompts for ids in labels]
    theirs, ours = (
        np.array(scorer.log_likelihoods(requests)).reshape(-1, len(labels))
        for scorer in (TorchScorer(model, tokenizer), EngineScorer(engine))
    )
    best = np.sort(theirs, axis=1)
    different = np.flatnonzero(theirs.argmax(1) != ours.argmax(1))
    return {
        "task": task.name,
        "items": len(task.test),
        "different": [{"item": int(i), "margin": float(best[i, -1] - best[i, -2])} for i in different],
        "label_tolerance": LABEL_TOLERANCE,
        "largest_score_difference": float(np.abs(ours - theirs).max()),
        "median_score_difference": float(np.median(np.abs(ours - theirs))),
    }


def compare(
    source: Path,
    prompts: Sequence[str],
    tokens: int,
    threads: int | None = None,
    recipe: Recipe | None = None,
    task: bool = False,
) -> dict[str, Any]:
    """Everything this page promises, for one student."""
    model, tokenizer = load_model(source).eval(), load_tokenizer(source)
    with tempfile.TemporaryDirectory() as folder:
        export(source, Path(folder) / "packed", head="f32")
        engine = Engine(Path(folder) / "packed", threads=threads, kv_cache="fp32")
        trits = differing_trits(model, Path(folder) / "packed")
        different = free = total = 0
        divergences = []
        for index, prompt in enumerate(prompts):
            ids = list(tokenizer(prompt)["input_ids"])
            _, taps = engine.session().forward_tapped(np.array(ids, np.int32))
            codes = torch_codes(model, ids, taps)[1]
            different += differing_codes(codes, taps)
            free += differing_codes(torch_codes(model, ids)[1], taps)
            total += sum(code.size for code in codes.values())
            found = first_divergence(model, engine, ids, tokens)
            if found is not None:
                divergences.append({"prompt": index} | found)
        more = {}
        if recipe is not None:
            more["perplexity"] = text_parity(recipe, model, tokenizer, engine)
            if task:
                more["decisions"] = task_parity(recipe, model, tokenizer, engine)
    return {
        "student": str(source),
        "prompts": len(prompts),
        "tokens": tokens,
        "isa": engine.core.isa,
        "differing_trits": trits,
        "activation_codes": total,
        "equal_codes_share": 1 - different / total,
        "equal_codes_share_without_shared_states": 1 - free / total,
        "divergences": divergences,
        "tolerance": TOLERANCE,
        **more,
    }


def failures(report: dict[str, Any]) -> list[str]:
    """What of the promise a report breaks."""
    found = []
    if report["differing_trits"]:
        found.append(f"{report['differing_trits']} trits differ")
    if report["equal_codes_share"] < LEAST_CODES:
        found.append(f"only {report['equal_codes_share']:.5f} of the activation codes are equal")
    found += [f"unexplained divergence {d}" for d in report["divergences"] if d["margin"] > TOLERANCE]
    if "decisions" in report:
        different = report["decisions"]["different"]
        found += [f"unexplained decision {d}" for d in different if d["margin"] > LABEL_TOLERANCE]
    if "perplexity" in report:
        ratio = report["perplexity"]["engine"] / report["perplexity"]["torch"]
        if abs(ratio - 1) > PERPLEXITY_TOLERANCE:
            found.append(f"perplexity is {ratio:.5f} of torch's")
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("student", type=Path)
    parser.add_argument("prompts", type=Path, help="one prompt a line")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--recipe", type=Path, help="compare on its held-out text too")
    parser.add_argument("--task", action="store_true", help="with --recipe: on its task's test items too")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    prompts = [line for line in options.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    recipe = load_recipe(options.recipe, options.set) if options.recipe else None
    report = compare(options.student, prompts, options.tokens, options.threads, recipe, options.task)
    text = json.dumps(report, indent=1)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    print(text)
    if found := failures(report):
        sys.exit("; ".join(found))


if __name__ == "__main__":
    main()
