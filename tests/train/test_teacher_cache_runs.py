"""The teacher cache as a step of a run: sharing, resuming, processes, and a cache that is named.

Oracles: the training beside the live teacher, and a cache that was filled without a break by one process.
"""

import errno
import hashlib
import json
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from bitdistill.data import teacher_rows
from bitdistill.train import callbacks, teacher_cache


@pytest.fixture(autouse=True)
def _many_shards(monkeypatch):
    monkeypatch.setattr(teacher_rows, "SHARD_TOKENS", 64)
    monkeypatch.setattr(teacher_cache, "BATCH_TOKENS", 40)


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
    short = ("distill.teacher_cache=hidden", "distill.epochs=0.2")
    run("first", *short, "distill.kd_tokens=all")
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
        settings = [*short, "distill.kd_tokens=all", setting]
        settings += ["distill.relation_heads=0"] if name == "no_relation" else []
        run(name, *settings)
    run("no_logits", *short, "distill.lambda_logits=0")
    assert [digests(cache) for cache in caches(tmp_path)] == [before]


def test_what_decides_the_rows_decides_the_cache(run, tmp_path):
    settings = ("distill.teacher_cache=topk", "distill.cache_top_k=4", "distill.epochs=0.2")
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
