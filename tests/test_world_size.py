"""A step goes on with other processes, sharded or not, to where one process without a stop ends.

The oracle is one process. Two sum a step's gradient in another order, so weights agree to 1e-4 of the way that they
moved and losses to 1e-4. Runs of one kind are equal to the bit.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from pair import STOPPED, stopped_at
from safetensors.torch import load_file
from test_processes import WEIGHT_TOLERANCE, command, distance, log, untimed

STEPS, SAVED, STOP = 8, 3, 5
LOSS_TOLERANCE = 1e-4


def pretrain(project: Path, student: Path, output: Path, *, precision: str = "fp32", **batch: int) -> list:
    """Eight steps of a global batch of 8."""
    settings = {"tokens": 1024, "save_every": SAVED, "precision": f'"{precision}"'}
    changes = [f"pretrain.{key}={value}" for key, value in (settings | batch).items()]
    words = ["pretrain", project, "--source", student, "--output", output]
    return [str(word) for word in (*words, *(part for change in changes for part in ("--set", change)))]


@pytest.fixture(scope="module")
def runs(cli, python, project, student, qwen3, tmp_path_factory) -> SimpleNamespace:
    """Every run of this file; those of two processes share one launch."""
    folder = tmp_path_factory.mktemp("world_size")

    def on_one(
        name: str, *, source=student, stop_at: int | None = None, batch_size: int = 8, **settings
    ) -> None:
        arguments = pretrain(project, source, folder / name, batch_size=batch_size, **settings)
        with stopped_at(stop_at):
            outcome = cli(*arguments)
        assert outcome.status == (STOPPED if stop_at else 0), outcome.err

    def on_two(
        name: str,
        *,
        source=student,
        batch_size: int = 4,
        stop_at: int | None = None,
        sharded=False,
        **settings,
    ) -> dict:
        arguments = pretrain(project, source, folder / name, batch_size=batch_size, **settings)
        return {"arguments": arguments, "stop_at": stop_at, "sharded": sharded}

    on_one("one")
    on_one("one, bf16", precision="bf16")
    for name in ("one -> two", "one -> sharded"):
        on_one(name, stop_at=STOP)
    learned = folder / "learned"
    words = ("refine", project, "--source", qwen3, "--output", learned, "--set", "refine.scale=learned")
    assert cli(*words).status == 0
    on_one("learned, one", source=learned)
    assert cli(*command(project, qwen3, folder / "whole", batch_size=8)).status == 0
    small = {"batch_size": 2, "gradient_accumulation_steps": 2}
    jobs = [
        on_two("one -> two", batch_size=8),
        on_two("two -> one", stop_at=STOP),
        on_two("one -> sharded", batch_size=8, sharded=True),
        on_two("sharded -> one", stop_at=STOP, sharded=True, **small),
        on_two("sharded -> sharded", stop_at=STOP, sharded=True),
        on_two("sharded -> sharded", sharded=True),
        on_two("sharded", sharded=True),
        on_two("sharded, bf16", sharded=True, precision="bf16"),
        on_two("learned, sharded", source=learned, stop_at=STOP, sharded=True),
        on_two("learned, sharded", source=learned, sharded=True),
    ]
    whole_run = command(project, qwen3, folder / "whole, sharded", batch_size=4)
    jobs.append({"arguments": list(map(str, whole_run)), "sharded": True})
    done = python(Path(__file__).with_name("pair.py"), json.dumps(jobs), processes=2)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["statuses"] == [STOPPED if job.get("stop_at") else 0 for job in jobs], done.stderr
    shards = folder / "sharded -> one.partial" / "trainer" / f"checkpoint-{SAVED}" / "pytorch_model_fsdp_0"
    assert len(list(shards.glob("*.distcp"))) == 2
    on_one("two -> one", batch_size=4)
    on_one("sharded -> one", **small)
    return SimpleNamespace(folder=folder, student=student, qwen3=qwen3, unreduced=found["unreduced"])


def assert_same_losses(expected: Path, found: Path, *, rel: float = LOSS_TOLERANCE) -> None:
    left, right = log(expected), log(found)
    assert [line["step"] for line in right] == [line["step"] for line in left]
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        keys = [key for key in a if key.startswith(("loss", "optim/"))]
        assert {key: b[key] for key in keys} == pytest.approx(
            {key: a[key] for key in keys}, rel=rel, abs=2e-6
        )


CHANGES = ["one -> two", "two -> one", "one -> sharded", "sharded -> one", "sharded"]


@pytest.mark.parametrize("name", CHANGES)
def test_the_end_is_that_of_one_process(runs, name):
    moved = distance(runs.folder / "one", runs.student)
    assert moved > 0.1
    assert distance(runs.folder / name, runs.folder / "one") < WEIGHT_TOLERANCE * moved
    assert_same_losses(runs.folder / "one", runs.folder / name)
    assert len(log(runs.folder / name)) == STEPS


def test_learned_scales_are_trained_in_shards_as_on_one_process(runs):
    """One number a matrix: the first process holds it, the other an empty part, also in the checkpoint."""
    moved = distance(runs.folder / "learned, one", runs.folder / "learned")
    assert distance(runs.folder / "learned, sharded", runs.folder / "learned, one") < WEIGHT_TOLERANCE * moved
    assert_same_losses(runs.folder / "learned, one", runs.folder / "learned, sharded")
    before, after = (
        load_file(runs.folder / name / "model.safetensors") for name in ("learned", "learned, sharded")
    )
    scales = [name for name in after if name.endswith(".weight_scale")]
    assert len(scales) == 14
    assert all(after[name] > 0 and after[name] != before[name] for name in scales)


def test_gradients_of_a_sharded_student_are_reduced_after_every_micro_batch(runs):
    """Kept until the last one they would be whole on every process."""
    assert runs.unreduced == 0


def test_a_sharded_step_that_was_stopped_continues_bit_for_bit(runs):
    assert distance(runs.folder / "sharded -> sharded", runs.folder / "sharded") == 0
    assert untimed(runs.folder / "sharded -> sharded") == untimed(runs.folder / "sharded")


def test_statistics_of_sharded_weights_are_those_of_whole_ones(runs):
    expected, found = (runs.folder / name for name in ("one", "sharded"))
    for a, b in zip(log(expected), log(found), strict=True):
        for key in ("quant/flip_rate", "quant/zero_frac"):
            assert b[key] == pytest.approx(a[key], abs=1e-4)
    a, b = (json.loads((folder / "weights.json").read_text()) for folder in (expected, found))
    assert sum(b["counts"]) == sum(a["counts"])
    assert b == {key: pytest.approx(value, abs=1e-3 if key != "counts" else 5) for key, value in a.items()}


def test_in_bf16_a_sharded_student_has_the_trits_of_the_fp32_latents(runs):
    """Latents that FSDP2 gathered in bf16, as accelerate would have it, give other trits and another loss."""
    first, sharded = (log(runs.folder / name)[0] for name in ("one, bf16", "sharded, bf16"))
    assert sharded["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert_same_losses(runs.folder / "one, bf16", runs.folder / "sharded, bf16", rel=2e-2)


@pytest.mark.parametrize("step", ["fp16_sft", "pretrain-subln", "bitdistill"])
def test_a_whole_recipe_is_that_of_one_process(runs, step):
    """Teacher, stage 2, and stage 3 with a sharded teacher beside the student."""
    expected, found = (runs.folder / name / "small" for name in ("whole", "whole, sharded"))
    assert_same_losses(expected / step, found / step)
    parent = {"fp16_sft": runs.qwen3, "pretrain-subln": expected / "refine-subln"}.get(
        step, expected / "pretrain-subln"
    )
    assert distance(expected / step, found / step) < WEIGHT_TOLERANCE * distance(expected / step, parent)


def test_a_number_that_cannot_share_the_global_batch_is_refused_and_nothing_is_changed(
    cli, project, student, tmp_path, monkeypatch
):
    from bitdistill.train import trainer

    arguments = pretrain(project, student, tmp_path / "new", batch_size=8)
    with stopped_at(STOP):
        assert cli(*arguments).status == STOPPED
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "num_processes", lambda: 3)
        refused = cli(*arguments)
    assert refused.status == 1
    assert "3 processes cannot share a global batch of 8 sequences" in refused.err
    assert "Start 2 or 4 to continue it" in refused.err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
