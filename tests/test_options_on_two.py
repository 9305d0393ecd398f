"""Options of the training loop on two processes, under DDP and FSDP2, against one process with the same global batch.

Sums of gradients have another order, so weights agree to a share of the way that they moved, as in ``test_processes``.
"""

import json
from pathlib import Path

import pytest
from pair import STOPPED
from test_processes import WEIGHT_TOLERANCE, distance

TEACHER = ("lambda_logits=0.5",)
TAIL = (
    "quant_warmup_ratio=0.3",
    "quant_warmup_form=soft",
    "freeze_codes_ratio=0.5",
    "freeze_codes_lr=0.5",
    "int4_activations_ratio=0.5",
)
OPTIONS = {"taught": (*TEACHER, *TAIL), "averaged": ("ema_decay=0.6",)}
TWO = ("taught", "taught, sharded", "averaged")


@pytest.fixture(scope="module")
def runs(cli, python, project, student, llama, tmp_path_factory) -> Path:
    """Eight steps of stage 2 with the options, on one and two processes; the sharded one is stopped and resumed."""
    folder = tmp_path_factory.mktemp("options")

    def pretrain(name: str, batch_size: int) -> list[str]:
        option = name.partition(",")[0].removeprefix("one ")
        settings = (f"batch_size={batch_size}", "tokens=1024", "save_every=3", *OPTIONS[option])
        changes = [word for setting in settings for word in ("--set", f"pretrain.{setting}")]
        teacher = ["--teacher", str(llama)] if option == "taught" else []
        words = ("pretrain", project, "--source", student, "--output", folder / name)
        return [*map(str, words), *teacher, *changes]

    for option in OPTIONS:
        outcome = cli(*pretrain(f"one {option}", 8))
        assert outcome.status == 0, outcome.err
    jobs = [{"arguments": pretrain("taught, sharded", 4), "sharded": True, "stop_at": 5}]
    jobs += [{"arguments": pretrain(name, 4), "sharded": "sharded" in name} for name in TWO]
    jobs.append({"arguments": pretrain("averaged, sharded", 4), "sharded": True})
    done = python(Path(__file__).with_name("pair.py"), json.dumps(jobs), processes=2)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["statuses"] == [STOPPED, *[0] * len(TWO), 1], done.stderr
    return folder


@pytest.mark.parametrize("name", TWO)
def test_the_end_is_that_of_one_process(runs, student, name):
    one = runs / f"one {name.partition(',')[0]}"
    moved = distance(one, student)
    assert moved > 0.1
    assert distance(runs / name, one) < WEIGHT_TOLERANCE * moved


@pytest.mark.parametrize("name", TWO)
def test_the_config_is_that_of_one_process(runs, name):
    one = runs / f"one {name.partition(',')[0]}" / "config.json"
    assert (runs / name / "config.json").read_text() == one.read_text()


def test_an_average_of_shards_is_refused(runs):
    assert not (runs / "averaged, sharded").exists()
    assert not list((runs / "averaged, sharded.partial").rglob("*.safetensors"))
