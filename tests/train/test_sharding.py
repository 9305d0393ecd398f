"""A student that FSDP2 shards over two processes (gloo, CPU), against the whole one.

Ternary weights must be equal to the bit; losses agree to 1e-6 in fp32, where only the order of a gradient's sum
differs, and to 1e-2 in bf16 or with activations of 4 bits, where a rounding may take a code over its threshold.
"""

import json
from pathlib import Path

import pytest

from bitdistill.errors import ConfigError
from bitdistill.processes import _check_sharding

EXACT = {
    "language modelling, fp32": 1e-6,
    "distillation, fp32": 1e-6,
    "language modelling, bf16": 1e-2,
    "distillation, bf16": 1e-2,
    "channel": 1e-2,
    "block": 1e-2,
    "learned, tensor": 1e-6,
    "learned, block": 1e-6,
    "BitNet v2": 1e-2,
}


@pytest.fixture(scope="module")
def found(python) -> dict[str, dict]:
    done = python(Path(__file__).parents[1] / "sharded_student.py", processes=2)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", EXACT)
def test_every_parameter_is_half_here(found, case):
    assert found[case]["sharded"]
    assert found[case]["share"] == pytest.approx(0.5, abs=0.05)
    assert found[case]["teacher_sharded"] == case.startswith(("distillation", "BitNet v2"))


@pytest.mark.parametrize("case", EXACT)
def test_ternary_weights_in_the_forward_pass_are_those_of_the_whole_student_bit_for_bit(found, case):
    assert found[case]["weights"] == 2 * 7
    assert found[case]["equal_weights"] == 2 * 7


@pytest.mark.parametrize("case", EXACT)
def test_losses_of_every_step_are_those_of_one_process(found, case):
    expected, losses = found[case]["losses"]
    assert len(set(expected)) == len(expected) == 4
    assert losses == pytest.approx(expected, rel=EXACT[case])
    assert losses[0] == pytest.approx(expected[0], rel=1e-6)


@pytest.mark.parametrize("case", EXACT)
def test_codes_that_each_process_counts_are_its_part_of_the_whole_ones(found, case):
    assert found[case]["equal_codes_of_shards"]


def test_gathering_in_bf16_would_give_other_weights(found):
    """What accelerate would set for bf16, so that the tests above mean something."""
    assert found["gathered in bf16"]["equal_weights"] < 2 * 7


# --- what accelerate may be asked for ---

GOOD = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}


@pytest.fixture
def on_accelerators(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    for name, value in GOOD.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_the_sharding_of_the_documentation_is_taken(on_accelerators):
    _check_sharding()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FSDP_VERSION", "1"),
        ("FSDP_VERSION", None),
        ("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true"),
    ],
)
def test_another_sharding_is_refused_with_the_value_that_works(on_accelerators, name, value):
    if value is None:
        on_accelerators.delenv(name)
    else:
        on_accelerators.setenv(name, value)
    with pytest.raises(ConfigError, match=f"Set {name.lower()}: {GOOD[name]}"):
        _check_sharding()


def test_sharding_without_an_accelerator_is_refused_instead_of_ignored(on_accelerators):
    on_accelerators.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(ConfigError, match="start without FSDP"):
        _check_sharding()
