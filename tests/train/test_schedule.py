"""Schedules at points where their closed form is known."""

import itertools
import math

import pytest

from bitdistill.config import TrainingConfig
from bitdistill.train.schedule import learning_rate_factor, quant_lambda_at, weight_decay_at

TOTAL = 100


def factors(total: int = TOTAL, **settings: object) -> list[float]:
    config = TrainingConfig(**settings)
    return [learning_rate_factor(config, step, total) for step in range(total + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "two_stage", "constant"])
def test_warm_up_rises_in_equal_steps_to_the_peak(schedule):
    factor = factors(schedule=schedule, warmup_ratio=0.25)
    assert factor[:25] == pytest.approx([(step + 1) / 25 for step in range(25)])
    assert factor[24] == factor[25] == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "two_stage", "constant"])
def test_without_warm_up_training_starts_at_the_peak(schedule):
    assert factors(schedule=schedule, warmup_ratio=0.0)[0] == 1.0


def test_a_share_of_a_step_is_rounded_up_to_one_step_of_warm_up():
    assert factors(total=10, schedule="linear", warmup_ratio=0.01)[:2] == [1.0, 1.0]
    assert factors(total=10, schedule="linear", warmup_ratio=0.0)[1] == pytest.approx(0.9)


def test_constant_stays_at_the_peak():
    assert set(factors(schedule="constant", warmup_ratio=0.0)) == {1.0}


def test_linear_falls_to_zero_in_equal_steps():
    factor = factors(schedule="linear", warmup_ratio=0.2)
    assert factor[20:] == pytest.approx([1 - step / 80 for step in range(81)])


def test_cosine_passes_through_its_known_points():
    factor = factors(schedule="cosine", warmup_ratio=0.2)
    # A quarter, half, three quarters and the end of the 80 steps after warm-up.
    assert factor[40] == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert factor[60] == pytest.approx(0.5)
    assert factor[80] == pytest.approx((1 - math.sqrt(0.5)) / 2)
    assert factor[100] == pytest.approx(0.0, abs=1e-15)
    assert factors(total=30, schedule="cosine", warmup_ratio=0.0)[10] == pytest.approx(0.75)


def test_two_stage_is_linear_and_drops_by_its_factor_in_the_middle():
    factor = factors(schedule="two_stage", warmup_ratio=0.0, two_stage_drop=0.4)
    assert factor[:50] == pytest.approx([1 - step / 100 for step in range(50)])
    assert factor[50:] == pytest.approx([0.4 * (1 - step / 100) for step in range(50, 101)])
    assert factor[50] == pytest.approx(0.2)


@pytest.mark.parametrize("schedule", ["two_stage", "two_stage_cosine"])
def test_learning_rate_and_weight_decay_change_at_the_same_step_whatever_the_warm_up(schedule):
    for warmup_ratio, total in ((0.0, 40), (0.1, 40), (0.25, 41)):
        config = TrainingConfig(
            schedule=schedule,
            two_stage_drop=0.25,
            warmup_ratio=warmup_ratio,
            weight_decay=0.1,
            weight_decay_schedule="half_then_zero",
        )
        rates = [learning_rate_factor(config, step, total) for step in range(total)]
        falls = [before - after for before, after in itertools.pairwise(rates)]
        drop = falls.index(max(falls)) + 1
        assert drop == math.ceil(total / 2)
        decays = [weight_decay_at(config, step, total) for step in range(total)]
        assert decays == [0.1] * drop + [0.0] * (total - drop)


def test_two_stage_cosine_leaves_one_cosine_in_the_middle_for_a_lower_one():
    factor = factors(schedule="two_stage_cosine", warmup_ratio=0.0, two_stage_drop=0.3)
    # The first would end at 0 after 100 steps: at 25 it is at cos^2(pi / 8). The second takes 50 steps from 0.3 to 0.
    assert factor[0] == 1.0
    assert factor[25] == pytest.approx(math.cos(math.pi / 8) ** 2)
    assert factor[49] == pytest.approx(math.cos(math.pi * 49 / 200) ** 2)
    assert factor[50] == pytest.approx(0.3)
    assert factor[75] == pytest.approx(0.15)
    assert factor[100] == pytest.approx(0.0, abs=1e-15)


def test_weight_decay_follows_a_cosine_to_the_middle_and_is_gone_after_it():
    config = TrainingConfig(weight_decay=0.1, weight_decay_schedule="cosine_then_zero")
    decays = [weight_decay_at(config, step, 12) for step in range(12)]
    assert decays[:5] == pytest.approx([0.1 * math.cos(math.pi * step / 24) ** 2 for step in range(5)])
    assert decays[4] == pytest.approx(0.075)
    assert decays[6:] == [0.0] * 6


def test_two_stage_without_a_drop_is_linear():
    two_stage = factors(schedule="two_stage", two_stage_drop=1.0)
    assert two_stage == factors(schedule="linear")


@pytest.mark.parametrize("schedule", ["cosine", "linear", "two_stage", "two_stage_cosine"])
def test_decay_never_rises_and_a_step_past_the_end_is_zero(schedule):
    settings = {"two_stage_drop": 0.4} if schedule.startswith("two_stage") else {}
    config = TrainingConfig(schedule=schedule, warmup_ratio=0.1, **settings)
    factor = factors(schedule=schedule, warmup_ratio=0.1, **settings)
    assert all(later <= earlier for earlier, later in itertools.pairwise(factor[10:]))
    assert learning_rate_factor(config, TOTAL + 7, TOTAL) == pytest.approx(0.0, abs=1e-15)


def test_a_run_that_is_all_warm_up_reaches_the_peak_at_its_last_step():
    factor = factors(total=4, schedule="linear", warmup_ratio=1.0)
    assert factor[:4] == [0.25, 0.5, 0.75, 1.0]


def test_weight_decay_is_constant_or_gone_in_the_second_half():
    constant = TrainingConfig(weight_decay=0.1)
    halved = TrainingConfig(weight_decay=0.1, weight_decay_schedule="half_then_zero")
    assert {weight_decay_at(constant, step, 10) for step in range(10)} == {0.1}
    assert [weight_decay_at(halved, step, 10) for step in range(10)] == [0.1] * 5 + [0.0] * 5
    # The middle step of an odd number belongs to the first half.
    assert [weight_decay_at(halved, step, 5) for step in range(5)] == [0.1] * 3 + [0.0] * 2


def test_quantisation_rises_linearly_from_zero_to_one_and_stays():
    config = TrainingConfig(quant_warmup_ratio=0.4)
    rise = [quant_lambda_at(config, step, 10) for step in range(10)]
    assert rise == [0.0, 0.25, 0.5, 0.75] + [1.0] * 6


def test_without_quantisation_warm_up_the_first_step_is_fully_quantised():
    assert quant_lambda_at(TrainingConfig(), 0, 10) == 1.0
