"""``bitdistill run``: every method of a recipe, each a fold of steps over checkpoints, and the table.

    base --------------- sft ------------------------------------- FP16-SFT (the teacher by default)
    base -- pretrain --- sft ------------------------------------- FP16-CT-SFT (or this: distill.teacher_method)
    base -- refine ----- sft ------------------------------------- BitNet-SFT
    base -- refine ----- pretrain (stage 2) --- distill (stage 3) -- BitDistill

Steps that methods share are made once. A step that is finished is not made again, so a killed run continues
where it was.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .checkpoint import provenance, read_run, write_json
from .config import LABELS, Recipe
from .data.corpus import PackedSequences, build_shards
from .data.prompts import PromptEncoder
from .data.tasks import Task, load_task
from .errors import ConfigError
from .evaluate import (
    OWN_BITS,
    Scorer,
    StateBits,
    TorchScorer,
    evaluate_classification,
    evaluate_classification_by_generation,
    evaluate_classifier,
    evaluate_generation,
    evaluate_summaries,
)
from .metrics import Evaluation, check_installed, judge_summaries, scores_as_dict
from .processes import is_main_process, on_main_process
from .recipe import to_dict
from .sparsity import counting, sparsity
from .train import base, sft, stage1_refine, stage2_pretrain, stage3_distill
from .train.encoder import (
    check_finished_classifier,
    check_recipe,
    check_stage_2,
    load_finished_classifier,
)
from .train.initialisation import check_initialisation
from .train.loading import check_family, is_encoder, load_config, load_model, load_tokenizer
from .train.size import model_size
from .train.teacher_cache import finished_caches

logger = logging.getLogger(__name__)

StepRun = Callable[[Recipe, str | Path, Path], Path]


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the table, parsed from its name."""

    key: str

    @property
    def name(self) -> str:
        return self.key.partition(":")[0]

    @property
    def switches(self) -> frozenset[str]:
        return frozenset(filter(None, self.key.partition(":")[2].split("+")))

    @property
    def label(self) -> str:
        suffix = f" ({', '.join(sorted(self.switches)).replace('_', ' ')})" if self.switches else ""
        return LABELS[self.name] + suffix

    @property
    def folder(self) -> str:
        return self.key.replace(":", "-")

    def preparation(self, recipe: Recipe, source: str | Path = "") -> list[tuple[str, StepRun, Recipe]]:
        """Steps before the task fine-tune: (folder, step, recipe for it). ``source`` is the full-precision model."""
        if self.name == "fp16_sft":
            return []
        if self.name == "fp16_ct_sft":
            alone = dataclasses.replace(recipe, pretrain=recipe.pretrain.without_teacher())
            return [("pretrain-fp16", stage2_pretrain.run, alone)]
        plain = self.name == "bitnet_sft" or "no_subln" in self.switches
        refine = recipe.refine.without_norms() if plain else recipe.refine
        sites = refine.norm_sites
        refined = dataclasses.replace(recipe, refine=refine)
        steps: list[tuple[str, StepRun, Recipe]] = [(f"refine-{sites}", stage1_refine.run, refined)]
        if self.has_stage_2:
            taught = dataclasses.replace(recipe, pretrain=recipe.pretrain.taught_by(str(source)))
            steps.append((f"pretrain-{sites}", stage2_pretrain.run, taught))
        return steps

    def fine_tune(
        self, recipe: Recipe, learning_rate: float | None, teacher: str | Path | None
    ) -> tuple[StepRun, Recipe]:
        """The task fine-tune of this method at one learning rate (None: the section's own)."""
        if self.has_stage_2 and recipe.pretrain.int4_activations_ratio:
            recipe = _with_activations_as_they_are(recipe)
        if self.name != "bitdistill" or "no_distill" in self.switches:
            config = recipe.sft
            if learning_rate is not None:
                config = dataclasses.replace(config, learning_rate=learning_rate)
            return sft.run, dataclasses.replace(recipe, sft=config)
        distill = recipe.distill
        if teacher is not None:
            method = type(distill).teacher_method  # it has been followed
            distill = dataclasses.replace(distill, teacher=str(teacher), teacher_method=method)
        if learning_rate is not None:
            distill = dataclasses.replace(distill, learning_rate=learning_rate)
        if "no_logits_kd" in self.switches:
            distill = distill.without("lambda_logits")
        if "no_relation_kd" in self.switches:
            distill = distill.without("gamma_relation")
        return stage3_distill.run, dataclasses.replace(recipe, distill=distill)

    def grid(self, recipe: Recipe) -> list[tuple[float | None, str]]:
        """Learning rates that are tried (None: the section's own), each with its folder."""
        rates = recipe.run.rates_of(self.key)
        if not rates:
            return [(None, self.folder)]
        return [(rate, f"{self.folder}/lr-{rate:g}") for rate in rates]

    @property
    def needs_teacher(self) -> bool:
        return self.name == "bitdistill" and "no_distill" not in self.switches

    @property
    def has_stage_2(self) -> bool:
        """Whether its student does; the full-precision control sees the same text and is none."""
        return self.name == "bitdistill" and "no_pretrain" not in self.switches


def _with_activations_as_they_are(recipe: Recipe) -> Recipe:
    """For the fine-tune of a student that stage 2 left with 4-bit activations: there is nothing to switch."""
    sft = dataclasses.replace(recipe.sft, int4_activations_ratio=0.0)
    distill = dataclasses.replace(recipe.distill, int4_activations_ratio=0.0)
    return dataclasses.replace(recipe, sft=sft, distill=distill)


def ordered_methods(recipe: Recipe) -> list[Method]:
    """The methods of a recipe as they are run: first, and always, the one that makes a teacher where one is needed."""
    methods = [Method(key) for key in recipe.run.methods]
    first = recipe.distill.teacher_method
    if not recipe.distill.teacher and any(m.needs_teacher for m in methods):
        methods.sort(key=lambda m: m.name != first)
        if methods[0].name != first:
            methods.insert(0, Method(first))
    return methods


def run(recipe: Recipe) -> dict[str, Any]:
    """Run every method of a recipe; returns what ``result.json`` holds.

    Raises:
        BitDistillError: bad input, or a run folder made with other settings.
    """
    started = time.monotonic()
    task = load_task(recipe.task)
    if task.kind == "summarisation":
        check_installed()
    methods = ordered_methods(recipe)
    teacher: str | Path | None = recipe.distill.teacher or None
    distills = any(m.needs_teacher for m in methods)
    if teacher is not None and distills:
        # before hours of training that would lack it
        teacher_config = load_config(teacher, recipe.distill.teacher_revision)
    if recipe.pretrain.teacher:
        load_config(recipe.pretrain.teacher, recipe.revision_of(recipe.pretrain.teacher))
    check_base(recipe)
    source = model_source(recipe)
    if any(not m.name.startswith("fp16") for m in methods):
        check_family(source, recipe.revision_of(source))  # before hours of training that could not be used
    config = load_config(source, recipe.revision_of(source))
    for _, step, refined in (step for m in methods for step in m.preparation(recipe)):
        if step is stage1_refine.run:
            check_initialisation(config.model_type, refined.refine)
    check_recipe(recipe, config, distill=distills)
    for _, step, step_recipe in (step for m in methods for step in m.preparation(recipe, source)):
        if step is stage2_pretrain.run:
            check_stage_2(step_recipe, source, config)
            stage2_pretrain.check_teacher(step_recipe, source)
    if teacher is not None and distills and is_encoder(config):
        check_finished_classifier(teacher, teacher_config, task)
    for method in (m for m in methods if m.needs_teacher):
        # A teacher that is still to be made has the shape of the model that it is made of.
        stage3_distill.check_teacher(method.fine_tune(recipe, None, teacher or source)[1], source)
    path = recipe.run_dir / "result.json"
    stored = _stored_result(path, recipe)
    reference = baselines(task) if recipe.run.judged_on == "test" else {}
    rows: dict[str, Any] = {}
    for method in methods:
        row, metric, checkpoint = _run_method(recipe, task, method, source, teacher)
        rows[method.key] = row
        if method.name == recipe.distill.teacher_method and teacher is None:
            teacher = checkpoint
        if any(stored.get(key) != value for key, value in rows.items()):
            meta = _meta(recipe, task, rows, time.monotonic() - started)
            stored = {"meta": meta | {"metric": metric, "baselines": reference}} | rows
            if is_main_process():
                write_json(path, stored)
    return stored


def _stored_result(path: Path, recipe: Recipe) -> dict[str, Any]:
    """What an earlier run of the same recipe left; empty if there is none.

    Where it holds a row that came out again, it stands as it is, with the versions, machine and time that made it.
    """
    try:
        stored = _read_json(path)
        return stored if stored["meta"]["recipe"] == to_dict(recipe) else {}
    except (OSError, ValueError, LookupError, TypeError):  # none yet, or damaged: it is written anew
        return {}


def check_base(recipe: Recipe) -> None:
    """A base that no method could start from is not made first."""
    if recipe.base is not None and (recipe.base.architecture == "bitnet" or recipe.base.ternary):
        raise ConfigError(
            f'base.architecture = "{recipe.base.architecture}": run compares what becomes of a base that is '
            "converted, and a BitNet is not. Make it with bitdistill base, then fine-tune it with bitdistill sft"
        )
    if recipe.base is not None and recipe.base.continue_from:
        check_family(recipe.base.continue_from)


def model_source(recipe: Recipe) -> str | Path:
    """The full-precision model of a recipe, made first if it has a ``[base]``."""
    if recipe.base is not None:
        return base.run(recipe, recipe.run_dir / "base")
    if not recipe.model.source:
        raise ConfigError("model.source is empty: name the model to convert, or add a [base] section")
    return recipe.model.source


def _run_method(
    recipe: Recipe, task: Task, method: Method, source: str | Path, teacher: str | Path | None
) -> tuple[dict[str, Any], str, Path]:
    checkpoint, steps = source, []
    for folder, step, step_recipe in method.preparation(recipe, source):
        checkpoint = step(step_recipe, checkpoint, recipe.run_dir / folder)
        steps.append(folder)
    prepared = checkpoint
    grid = method.grid(recipe)
    chosen_before = bool(recipe.run.method_rates) and len(grid) == 1
    candidates = []
    for rate, folder in grid:
        step, step_recipe = method.fine_tune(recipe, rate, teacher)
        tuned = step(step_recipe, prepared, recipe.run_dir / folder)
        validation = 0.0 if chosen_before else evaluate_step(recipe, task, tuned, "validation").value
        candidates.append((validation, rate, folder, tuned))
    # The first of equals wins, so the order of the grid decides ties.
    validation, rate, folder, tuned = max(candidates, key=lambda c: c[0])
    found = evaluate_step(recipe, task, tuned, recipe.run.judged_on)
    steps.append(folder)
    records = {name: read_run(recipe.run_dir / name) for name in steps}
    size = model_size(load_model(tuned))
    training = records[folder]["settings"]["training"]
    row = {
        "label": method.label,
        found.metric: found.value,
        "stderr": found.stderr,
        "bytes": size.bytes,
        "parameters": size.parameters,
        "learning_rate": training["learning_rate"],
        "steps": steps,
        "time_s": {name: step_seconds(record) for name, record in records.items()},
    }
    if found.others:
        row["metrics"] = scores_as_dict(found.others)
    if not chosen_before:
        row[f"validation_{found.metric}"] = validation
    if len(candidates) > 1:
        row["grid"] = {f"{lr:g}": value for value, lr, _, _ in candidates}
        row["tried"] = [tried for _, _, tried, _ in candidates]
    logger.info("%s: %s %.4f", method.label, found.metric, found.value)
    return row, found.metric, tuned


def step_seconds(record: dict[str, Any]) -> float:
    """Seconds that a step took: of its training, resumes included, where it trains."""
    return float(record["metrics"].get("train_time_s", record["time_s"]))


def evaluate_step(recipe: Recipe, task: Task, checkpoint: Path, split: str) -> Evaluation:
    """Evaluate a finished step on a split of the task; the result is kept in the step's folder.

    With several processes the main one evaluates and the others wait for its file.
    """
    path = checkpoint / f"eval-{split}.json"
    key = {"task_digest": task.digest, "scoring": recipe.task.scoring}

    def evaluate() -> None:
        if not (path.is_file() and key.items() <= _read_json(path).items()):
            write_json(path, key | evaluate_model(recipe, task, checkpoint, split).as_dict())

    on_main_process(evaluate)
    return Evaluation.from_dict(_read_json(path))


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def evaluate_model(
    recipe: Recipe, task: Task, source: str | Path, split: str, bits: StateBits = OWN_BITS
) -> Evaluation:
    """Evaluate any checkpoint on ``validation`` or ``test``."""
    revision = recipe.revision_of(source)
    config = load_config(source, revision)
    check_recipe(recipe, config, distill=False)
    tokenizer = load_tokenizer(source, revision)
    if is_encoder(config):
        model = bits.apply(load_finished_classifier(source, revision, task))
        return evaluate_classifier(model, tokenizer, task.part(split), recipe.task.max_length)
    scorer = TorchScorer(bits.apply(load_model(source, revision)), tokenizer)
    return evaluate_scorer(recipe, task, scorer, tokenizer, split)


def evaluate_scorer(
    recipe: Recipe, task: Task, scorer: Scorer, tokenizer: PreTrainedTokenizerBase, split: str
) -> Evaluation:
    """Evaluate whatever answers for a model, torch or the engine, on ``validation`` or ``test``."""
    encoder = PromptEncoder(tokenizer, recipe.task.max_length)
    examples = task.part(split)
    if task.kind == "summarisation":
        return evaluate_summaries(scorer, encoder, examples, recipe.task.max_new_tokens)
    if task.kind == "generation":
        return evaluate_generation(scorer, encoder, examples, recipe.task.max_new_tokens)
    if recipe.task.scoring == "generation":
        return evaluate_classification_by_generation(scorer, encoder, examples, task.labels)
    return evaluate_classification(scorer, encoder, examples, task.labels)


def baselines(task: Task) -> dict[str, dict[str, float]]:
    """Scores on the test items that take no model, to hold the methods against; by name and metric."""
    if not task.lead:
        return {}
    found = judge_summaries(task.lead, [e.answer for e in task.test])
    return {"lead-3": {found.metric: found.value} | {key: score.value for key, score in found.others.items()}}


def heldout_perplexity(recipe: Recipe, source: str | Path, bits: StateBits = OWN_BITS) -> float:
    """Perplexity of a checkpoint on the part of the corpus that no training step reads.

    Raises:
        ConfigError: it is an encoder, which gives no text a probability.
    """
    config = load_config(source, recipe.revision_of(source))
    if is_encoder(config):
        raise ConfigError(
            f"--perplexity: {source} is an encoder ({config.model_type}), whose tokens see those behind them, so a "
            "text has no probability; leave the option out to judge it on the task"
        )
    tokenizer = load_tokenizer(source, recipe.revision_of(source))
    model = bits.apply(load_model(source, recipe.revision_of(source)))
    return TorchScorer(model, tokenizer).perplexity(heldout_sequences(recipe, tokenizer))


def heldout_sparsity(recipe: Recipe, source: str | Path, bits: StateBits = OWN_BITS) -> dict[str, float]:
    """Share of zeros that a student's ternary linears meet on the held-out part; see ``sparsity``."""
    tokenizer = load_tokenizer(source, recipe.revision_of(source))
    model = bits.apply(load_model(source, recipe.revision_of(source)))
    with counting(model) as count:
        TorchScorer(model, tokenizer).perplexity(heldout_sequences(recipe, tokenizer))
    return sparsity(model, count)


def heldout_sequences(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PackedSequences:
    """The part of the corpus that no training step reads, packed."""
    shards = build_shards(recipe.corpus, "heldout", tokenizer, recipe.shards_dir)
    return PackedSequences(shards, recipe.corpus.sequence_length)


def _meta(recipe: Recipe, task: Task, rows: dict[str, Any], seconds: float) -> dict[str, Any]:
    steps = {step for row in rows.values() for step in (*row["steps"], *row.get("tried", ()))}
    if recipe.base is not None:
        steps |= {"base-blank", "base"}
    steps |= {folder.name for folder in finished_caches(recipe.run_dir)}
    judged_on = recipe.run.judged_on
    return {
        "name": recipe.name,
        "task": task.name,
        "seed": recipe.seed,
        "train_items": len(task.train),
        "judged_on": judged_on,
        "eval_items": len(task.part(judged_on)),
        "items_digest": task.part_digest(judged_on),
        "majority_accuracy": task.majority_accuracy(judged_on),
        "last_run_s": round(seconds, 1),
        "total_time_s": round(sum(step_seconds(read_run(recipe.run_dir / step)) for step in steps), 1),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "recipe": to_dict(recipe),
        **provenance(),
    }
