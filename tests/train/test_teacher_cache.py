"""The teacher cache: what it holds, the losses it gives, resuming, sharing, and the caches that are refused.

Oracles: Hugging Face's forward pass of each example alone, the training beside the live teacher, and a cache that was
filled without a break.
"""

import errno
import hashlib
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from hf_reference import rotated_states
from safetensors.torch import load_file
from torch.nn import functional as F

from bitdistill.data import teacher_rows
from bitdistill.data.tasks import load_task
from bitdistill.data.teacher_rows import RowPlan, TaughtBatch
from bitdistill.recipe import load_recipe
from bitdistill.train import callbacks, teacher_cache
from bitdistill.train.loading import load_model, load_tokenizer
from bitdistill.train.objective import Distillation
from bitdistill.train.sft import task_sequences
from bitdistill.train.teacher_cache import cached_teacher

BF16 = 2**-8
"""Relative error of rounding to bf16, at most."""


@pytest.fixture(autouse=True)
def _many_shards(monkeypatch):
    monkeypatch.setattr(teacher_rows, "SHARD_TOKENS", 64)
    monkeypatch.setattr(teacher_cache, "BATCH_TOKENS", 40)


@pytest.fixture
def make(project, student, teacher, tmp_path):
    """``make("distill.teacher_cache=topk")`` -> recipe, cached teacher, taught sequences."""

    def build(*settings: str):
        overrides = [f'distill.teacher="{teacher}"', f'output_dir="{tmp_path}"', *settings]
        recipe = load_recipe(project, overrides)
        tokenizer = load_tokenizer(student)
        sequences = task_sequences(recipe, load_task(recipe.task), tokenizer)
        return recipe, *cached_teacher(recipe, student, tokenizer, sequences)

    return build


def alone(item) -> dict[str, torch.Tensor]:
    """One example as a batch of its own, without padding."""
    ids = torch.tensor([item.prompt + item.answer])
    labels = ids.clone()
    labels[:, : len(item.prompt)] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def kd_positions(item, kd_tokens: str) -> slice:
    return slice(0, len(item)) if kd_tokens == "all" else slice(len(item.prompt) - 1, len(item) - 1)


# --- what it holds ---


@pytest.mark.parametrize("kd_tokens", ["response", "all"])
def test_hidden_states_and_relation_states_are_the_teachers_on_each_example(make, teacher, kd_tokens):
    _, _, taught = make(
        "distill.teacher_cache=hidden", f"distill.kd_tokens={kd_tokens}", "distill.relation_layers=[0, 1]"
    )
    model = load_model(teacher)
    assert len(taught) == len(taught.lengths) > 8
    for index in (0, 5, len(taught) - 1):
        example = taught[index]
        batch = alone(example.encoded)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            hidden = model.model(**inputs).last_hidden_state[0]
        expected = {"teacher_hidden": hidden[kd_positions(example.encoded, kd_tokens)]}
        for layer in (0, 1):
            for letter, state in zip("qkv", rotated_states(model, layer, **inputs), strict=True):
                expected[f"teacher_{letter}.{layer}"] = state[0].transpose(0, 1)
        assert example.rows.keys() == expected.keys()
        for name, tensor in expected.items():
            assert example.rows[name].dtype == torch.bfloat16
            torch.testing.assert_close(example.rows[name].float(), tensor, rtol=BF16, atol=1e-5)


def test_top_k_rows_are_those_of_the_teachers_logits(make, teacher):
    settings = ("distill.cache_top_k=5", "distill.temperature=3", "distill.gamma_relation=0")
    _, _, taught = make("distill.teacher_cache=topk", "distill.relation_heads=0", *settings)
    model = load_model(teacher)
    for index in (1, 7):
        example = taught[index]
        with torch.no_grad():
            logits = model(alone(example.encoded)["input_ids"]).logits[0].double()
        p = F.softmax(logits[kd_positions(example.encoded, "response")] / 3, dim=-1)
        values, ids = p.sort(dim=-1, descending=True)
        assert set(example.rows) == {"teacher_top", "teacher_top_log_p", "teacher_rest_log_p"}
        assert torch.equal(example.rows["teacher_top"].long(), ids[:, :5])
        found = example.rows["teacher_top_log_p"].double().exp()
        torch.testing.assert_close(found, values[:, :5], rtol=5e-3, atol=0)
        rest = example.rows["teacher_rest_log_p"].double().exp()
        torch.testing.assert_close(rest, values[:, 5:].sum(dim=-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("temperature", "warned"), [(5, True), (0.02, False)])
def test_a_top_k_that_holds_little_of_the_mass_is_warned_of(make, caplog, temperature, warned):
    caplog.set_level("WARNING")
    make("distill.teacher_cache=topk", "distill.cache_top_k=2", f"distill.temperature={temperature}")
    text = " ".join(record.getMessage() for record in caplog.records)
    assert ("of the teacher's mass" in text) == warned


# --- what it teaches ---

CASES = {
    "response": (),
    "all tokens": ("distill.kd_tokens=all",),
    "both layers, causal": ("distill.relation_layers=[0, 1]", "distill.relation_mask=causal"),
    "cosine, pre-rope": ("distill.relation_form=cosine", "distill.relation_states=pre_rope"),
    "logits only": ("distill.gamma_relation=0", "distill.relation_heads=0"),
    "relations only": ("distill.lambda_logits=0",),
}


@pytest.mark.parametrize("case", CASES)
def test_the_losses_and_gradients_are_those_beside_the_live_teacher(make, student, teacher, case):
    """Up to the rounding of what is kept; batches in an order of their own."""
    recipe, cached, taught = make("distill.teacher_cache=hidden", *CASES[case])
    batch = TaughtBatch(1)([taught[index] for index in (9, 2, 13, 4)])
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    results, gradients = [], []
    for source, inputs in ((cached, batch), (load_model(teacher), plain)):
        model = load_model(student)
        objective = Distillation(model, source, recipe.distill)
        result = objective(**inputs, totals=objective.counts(inputs))
        result["loss"].backward()
        results.append({name: value.item() for name, value in result.items()})
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert results[0] == pytest.approx(results[1], rel=2e-2)
    assert results[0]["loss/ce"] == pytest.approx(results[1]["loss/ce"], rel=1e-6)
    assert F.cosine_similarity(*gradients, dim=0) > 0.9995


def test_the_losses_are_exact_where_the_live_teachers_states_are_bf16(make, student, teacher):
    recipe, cached, taught = make(
        "distill.teacher_cache=hidden", "distill.gamma_relation=0", "distill.relation_heads=0"
    )
    batch = TaughtBatch(1)([taught[index] for index in (3, 8, 0)])
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    live = load_model(teacher)
    live.model.norm.register_forward_hook(lambda *call: call[-1].bfloat16().float())
    results, gradients = [], []
    for source, inputs in ((cached, batch), (live, plain)):
        model = load_model(student)
        objective = Distillation(model, source, recipe.distill)
        result = objective(**inputs, totals=objective.counts(inputs))
        result["loss"].backward()
        results.append(result["loss/logits_kd"])
        gradients.append([p.grad for p in model.parameters()])
    # The cache was filled in other batches, which round otherwise in fp32 but almost never across a bf16 boundary.
    torch.testing.assert_close(*results, rtol=1e-5, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("k", "tolerance"), [(300, 2e-3), (8, None)])
def test_top_k_gives_the_divergence_of_what_was_kept(make, student, teacher, k, tolerance):
    """With the whole vocabulary that of the live teacher; else that of merged distributions, in float64."""
    settings = ("distill.gamma_relation=0", "distill.relation_heads=0", "distill.temperature=2")
    recipe, cached, taught = make("distill.teacher_cache=topk", f"distill.cache_top_k={k}", *settings)
    items = [taught[index] for index in (9, 2, 13)]
    batch = TaughtBatch(1)(items)
    models = load_model(teacher), load_model(student)
    objective = Distillation(models[1], cached, recipe.distill)
    found = objective(**batch, totals=objective.counts(batch))["loss/logits_kd"].item()
    total, tokens = 0.0, 0
    for item in items:
        chosen = kd_positions(item.encoded, "response")
        with torch.no_grad():
            p, q = (
                F.softmax(m(alone(item.encoded)["input_ids"]).logits[0, chosen].double() / 2, dim=-1)
                for m in models
            )
        order = p.argsort(dim=-1, descending=True)
        p, q = (x.gather(-1, order) for x in (p, q))
        if k < 300:
            p, q = (torch.cat((x[:, :k], x[:, k:].sum(-1, keepdim=True)), dim=-1) for x in (p, q))
        total += float((p * (p.log() - q.log())).sum())
        tokens += len(p)
    assert found == pytest.approx(total / tokens, rel=tolerance or 2e-3)


def test_bf16_compute_teaches_as_the_live_teacher_does_under_autocast(make, student, teacher):
    recipe, cached, taught = make("distill.teacher_cache=hidden", "distill.precision=bf16")
    assert cached.head.weight.dtype == torch.bfloat16
    batch = TaughtBatch(1)([taught[index] for index in (9, 2, 13, 4)])
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    results = []
    for source, inputs in ((cached, batch), (load_model(teacher), plain)):
        objective = Distillation(load_model(student), source, recipe.distill)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = objective(**inputs, totals=objective.counts(inputs))
        results.append({name: value.item() for name, value in result.items()})
    assert results[0] == pytest.approx(results[1], rel=3e-2)


# --- as a step of a run ---


@pytest.fixture
def arguments(project, student, teacher, tmp_path):
    """``arguments("name", "distill.teacher_cache=hidden")`` -> of ``bitdistill``."""

    def build(name: str, *settings: str) -> list:
        values = [f'output_dir="{tmp_path}"', *settings]
        overrides = [word for value in values for word in ("--set", value)]
        models = ("--source", student, "--teacher", teacher, "--output", tmp_path / name)
        return ["distill", project, *models, *overrides]

    return build


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def caches(tmp_path) -> list[Path]:
    return sorted((tmp_path / "small").glob("teacher-cache-*"))


def digests(cache: Path) -> dict[str, str]:
    """Of every file of a cache but its record, which holds times."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(cache.iterdir())
        if path.name != "run.json"
    }


@pytest.fixture
def run(cli, arguments):
    """``run("name", "distill.teacher_cache=hidden")``: ``bitdistill distill`` in this process, without an error."""

    def distill(name: str, *settings: str) -> None:
        outcome = cli(*arguments(name, *settings))
        assert outcome.status == 0, outcome.err

    return distill


def test_a_training_from_the_cache_follows_the_one_beside_the_teacher(run, tmp_path):
    for name, form in (("live", "none"), ("cached", "hidden")):
        run(name, f"distill.teacher_cache={form}", "distill.epochs=2")
    live, cached = log(tmp_path / "live"), log(tmp_path / "cached")
    assert [line["step"] for line in live] == [line["step"] for line in cached]
    assert len(live) > 8
    for left, right in zip(live, cached, strict=True):
        for key in ("loss/ce", "loss/logits_kd", "loss/relation_kd"):
            assert right[key] == pytest.approx(left[key], rel=5e-2), key
    settings = json.loads((tmp_path / "live" / "run.json").read_text())["settings"]["training"]
    assert not [key for key in settings if "cache" in key]  # folders of before stay valid


def test_the_record_counts_what_the_shards_hold(run, tmp_path):
    run("cached", "distill.teacher_cache=hidden")
    (cache,) = caches(tmp_path)
    metrics = json.loads((cache / "run.json").read_text())["metrics"]
    shards = [load_file(path) for path in sorted(cache.glob("shard-*"))]
    assert metrics["shards"] == len(shards) > 3
    assert metrics["kd_tokens"] == sum(len(shard["teacher_hidden"]) for shard in shards)
    assert metrics["tokens"] == sum(len(shard["teacher_q.1"]) for shard in shards)


def test_other_rates_and_switched_off_losses_use_the_same_cache_without_the_teachers_body(
    run, tmp_path, monkeypatch
):
    run("first", "distill.teacher_cache=hidden", "distill.kd_tokens=all")
    before = digests(caches(tmp_path)[0])

    def no_body(*_):
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(teacher_cache, "load_model", no_body)
    for name, setting in (
        ("rate", "distill.learning_rate=5e-4"),
        ("form", "distill.relation_form=cosine"),
        ("tau", "distill.temperature=2"),
        ("no_relation", "distill.gamma_relation=0"),
    ):
        settings = ["distill.teacher_cache=hidden", "distill.kd_tokens=all", setting]
        settings += ["distill.relation_heads=0"] if name == "no_relation" else []
        run(name, *settings)
    run("no_logits", "distill.teacher_cache=hidden", "distill.lambda_logits=0")
    assert [digests(cache) for cache in caches(tmp_path)] == [before]


def test_what_decides_the_rows_decides_the_cache(run, tmp_path):
    settings = ("distill.teacher_cache=topk", "distill.cache_top_k=4")
    for name, more in (("a", ()), ("b", ("distill.temperature=1",)), ("c", ("task.max_length=9",))):
        run(name, *settings, *more)
    assert len(caches(tmp_path)) == 3


def test_the_methods_of_a_run_share_one_cache(cli, project, llama, tmp_path):
    methods = "run.methods=['bitdistill', 'bitdistill:no_logits_kd']"
    settings = (
        f'model.source="{llama}"', f'output_dir="{tmp_path}"', methods,
        "distill.teacher_cache=topk", "distill.cache_top_k=8", "pretrain.tokens=64", "sft.epochs=0.2",
        "distill.epochs=0.2",
    )  # fmt: skip
    outcome = cli("run", project, *(word for value in settings for word in ("--set", value)))
    assert outcome.status == 0, outcome.err
    (cache,) = caches(tmp_path)
    record = json.loads((cache / "run.json").read_text())
    result = json.loads((tmp_path / "small" / "result.json").read_text())
    steps = {step for key, row in result.items() if key != "meta" for step in row["steps"]}
    assert {"bitdistill", "bitdistill-no_logits_kd"} <= steps
    trained = [json.loads((tmp_path / "small" / step / "run.json").read_text()) for step in steps]
    seconds = sum(r["metrics"].get("train_time_s", r["time_s"]) for r in trained) + record["time_s"]
    assert result["meta"]["total_time_s"] == pytest.approx(seconds, abs=0.06)


def test_a_training_that_stopped_goes_on_to_the_same_weights(run, cli, arguments, tmp_path, monkeypatch):
    settings = ("distill.teacher_cache=hidden", "distill.epochs=2", "distill.save_every=4")
    run("whole", *settings)
    write = callbacks.MetricsFile.on_log

    def stop(self, args, state, control, logs=None, **more):
        write(self, args, state, control, logs=logs, **more)
        if state.global_step == 7:
            raise OSError(errno.ENOSPC, "stopped")

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.MetricsFile, "on_log", stop)
        assert cli(*arguments("stopped", *settings)).status == 1
    assert (tmp_path / "stopped.partial" / "trainer" / "checkpoint-4").is_dir()
    run("stopped", *settings)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]


# --- filling that stops ---

KILLED = """
import os, signal, sys
from bitdistill import cli
from bitdistill.data import teacher_rows
from bitdistill.train import teacher_cache

teacher_rows.SHARD_TOKENS, teacher_cache.BATCH_TOKENS = 64, 40
save = teacher_rows.save_file

def save_file(rows, path, metadata):
    save(rows, path, metadata)
    if "shard-00003" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)

teacher_rows.save_file = save_file
cli.main()
"""

PAIR = """
from bitdistill import cli
from bitdistill.data import teacher_rows
from bitdistill.train import teacher_cache

teacher_rows.SHARD_TOKENS, teacher_cache.BATCH_TOKENS = 64, 40
cli.main()
"""


@pytest.fixture
def whole(run, tmp_path) -> dict[str, str]:
    """A cache that was filled without a break; it is moved out of the way."""
    run("whole", "distill.teacher_cache=hidden")
    (cache,) = caches(tmp_path)
    found = digests(cache)
    shutil.rmtree(cache)
    assert len(found) > 4
    return found


def test_a_killed_filling_goes_on_to_the_same_bytes(run, python, arguments, tmp_path, whole):
    done = python("-c", KILLED, *arguments("killed", "distill.teacher_cache=hidden"))
    assert done.returncode == -signal.SIGKILL, done.stderr
    (partial,) = caches(tmp_path)
    assert partial.suffix == ".partial"
    left = {path.name: path.stat().st_mtime_ns for path in partial.glob("shard-*")}
    assert sorted(left) == [f"shard-0000{i}.safetensors" for i in range(3)]
    run("killed", "distill.teacher_cache=hidden")
    (cache,) = caches(tmp_path)
    assert digests(cache) == whole
    assert {name: (cache / name).stat().st_mtime_ns for name in left} == left  # not made again


def test_two_processes_fill_the_same_cache_and_train_as_one(run, python, arguments, tmp_path):
    settings = ("distill.teacher_cache=topk", "distill.cache_top_k=8")
    run("one", *settings)
    (cache,) = caches(tmp_path)
    expected = digests(cache)
    shutil.rmtree(cache)
    done = python("-c", PAIR, *arguments("two", *settings, "distill.batch_size=4"), processes=2)
    assert done.returncode == 0, done.stderr
    assert digests(caches(tmp_path)[0]) == expected
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert len(one) == len(two) > 3
    for left, right in zip(one, two, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-5)


# --- a cache that is named ---


def test_a_named_cache_is_made_and_then_used_wherever_it_lies(run, tmp_path, monkeypatch):
    named = f'distill.teacher_cache_dir="{tmp_path / "elsewhere"}"'
    run("first", "distill.teacher_cache=hidden", named)
    assert caches(tmp_path) == []
    moved = shutil.move(tmp_path / "elsewhere", tmp_path / "moved")
    monkeypatch.setattr(teacher_cache, "load_model", None)
    named = f'distill.teacher_cache_dir="{moved}"'
    run("second", "distill.teacher_cache=hidden", named)
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == (
        tmp_path / "second" / "model.safetensors"
    ).read_bytes()


# --- the plan ---


def test_every_example_has_its_place_in_shards_of_similar_lengths(make):
    recipe, _, taught = make(
        "distill.teacher_cache=hidden", "distill.gamma_relation=0", "distill.relation_heads=0"
    )
    plan = RowPlan(taught.sequences, recipe.distill.kd_tokens)
    assert sorted(index for shard in plan.shards for index in shard) == list(range(len(taught)))
    lengths = [taught.lengths[index] for shard in plan.shards for index in shard]
    assert lengths == sorted(lengths)
    for shard, indices in enumerate(plan.shards):
        batches = list(plan.batches(shard, 40))
        assert [index for batch in batches for index in batch] == indices
        assert all(len(b) * max(taught.lengths[i] for i in b) <= 40 for b in batches)
