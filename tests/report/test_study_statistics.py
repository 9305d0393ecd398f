"""The two-level bootstrap against closed forms: the normal approximation of independent items, and exact cases."""

import math
import statistics

import numpy as np
import pytest

from bitdistill.report.study.statistics import (
    DRAWS,
    closure_interval,
    deviation,
    interval,
    mean,
    resampled_means,
)


def bernoulli(shares: dict[str, float], items: int, seeds: tuple[int, ...] = (0,), seed: int = 3) -> dict:
    """Independent items of every seed, with these shares of right ones."""
    rng = np.random.default_rng(seed)
    return {
        name: (seeds, (rng.random((len(seeds), items)) < p).astype(np.uint8)) for name, p in shares.items()
    }


def test_mean_and_deviation() -> None:
    scores = (0.5, 0.75, 0.625, 0.5)
    assert mean(scores) == statistics.fmean(scores)
    assert deviation(scores) == pytest.approx(statistics.stdev(scores), rel=1e-12)
    assert deviation((0.5,)) is None


def test_enough_draws() -> None:
    assert DRAWS >= 2000


def test_interval_of_a_difference_is_that_of_the_normal_approximation() -> None:
    """One seed: var(difference) = var(a_i - b_i) / N, from the very items."""
    samples = bernoulli({"a": 0.7, "b": 0.6}, 3000)
    draws = resampled_means(samples)
    difference = samples["a"][1][0].astype(float) - samples["b"][1][0]
    found = interval(difference.mean(), draws["a"] - draws["b"])
    error = difference.std() / math.sqrt(len(difference))
    # The percentile of 4,000 draws is itself known to about 0.05 standard errors.
    assert found.low == pytest.approx(difference.mean() - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(difference.mean() + 1.96 * error, abs=0.2 * error)


def test_pairing_takes_what_the_methods_share_out_of_the_difference() -> None:
    """Items differ widely in difficulty, the methods by a constant: their difference is not in doubt at all."""
    items = np.random.default_rng(0).random((2, 500))
    draws = resampled_means({"a": ((0, 1), items), "b": ((0, 1), items - 0.25)})
    assert draws["a"].std() > 0.01
    np.testing.assert_allclose(draws["a"] - draws["b"], 0.25, atol=1e-12)


def test_items_are_drawn_once_for_all_seeds() -> None:
    """Seeds with equal answers: no seed averages another's items out, so the variance is that of one seed."""
    items = bernoulli({"a": 0.5}, 1000)["a"][1]
    draws = resampled_means({"one": ((0,), items), "three": ((0, 1, 2), np.repeat(items, 3, axis=0))})
    np.testing.assert_allclose(draws["one"], draws["three"], rtol=1e-12)
    assert draws["one"].std() == pytest.approx(items.std() / math.sqrt(1000), rel=0.05)


def test_seeds_are_resampled_with_replacement() -> None:
    """Two seeds that score 0 and 1 on every item: the mean is 0, 1/2, 1 with probability 1/4, 1/2, 1/4."""
    draws = resampled_means({"a": ((0, 1), np.array([[0.0] * 50, [1.0] * 50]))})["a"]
    values, counts = np.unique(draws, return_counts=True)
    np.testing.assert_allclose(values, [0, 0.5, 1])
    np.testing.assert_allclose(counts / len(draws), [0.25, 0.5, 0.25], atol=0.03)


def test_methods_with_the_same_seeds_share_their_draw_and_others_do_not() -> None:
    items = np.array([[0.0] * 50, [1.0] * 50])
    draws = resampled_means({"a": ((0, 1), items), "b": ((0, 1), items), "c": ((2, 3), items)})
    np.testing.assert_array_equal(draws["a"], draws["b"])
    assert abs(np.corrcoef(draws["a"], draws["c"])[0, 1]) < 0.1


def test_variance_of_two_levels() -> None:
    """x[s, i] = u_s + v_i: the variance of the resampled mean is var(u) / S + var(v) / N, both over the sample."""
    rng = np.random.default_rng(5)
    u, v = rng.normal(size=4), rng.normal(size=400)
    draws = resampled_means({"a": ((0, 1, 2, 3), u[:, None] + v)})["a"]
    assert draws.var() == pytest.approx(u.var() / 4 + v.var() / 400, rel=0.1)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    held = 0
    for trial in range(200):
        samples = bernoulli({"a": 0.7, "b": 0.65}, 300, seed=trial)
        draws = resampled_means(samples, draws=400)
        found = interval(0.0, draws["a"] - draws["b"])
        held += found.low <= 0.05 <= found.high
    assert 0.90 <= held / 200 <= 0.985  # 0.95, give or take 2.3 standard errors of 200 trials


def test_a_sample_more_changes_no_other_sample_s_draws() -> None:
    samples = bernoulli({"a": 0.7, "b": 0.6, "c": 0.5}, 100, seeds=(0, 1, 2))
    alone = resampled_means({"b": samples["b"]})["b"]
    np.testing.assert_allclose(resampled_means(samples)["b"], alone, rtol=1e-12)


def test_closure_of_draws_that_all_say_the_same() -> None:
    full = np.random.default_rng(0).uniform(0.6, 0.7, 1000)
    direct = full - 0.1
    assert closure_interval(direct + 0.05, direct, full) == pytest.approx((0.5, 0.5))
    assert closure_interval(full, direct, full) == pytest.approx((1, 1))
    assert closure_interval(direct, direct, full) == (0, 0)


def test_draws_without_a_gap_widen_the_interval_of_closure_and_end_it() -> None:
    """Of 1,000 draws the k-th has closure k / 1000; some have no gap and count as beyond either bound."""
    direct, full = np.zeros(1000), np.ones(1000)
    student = np.arange(1000) / 1000

    def bounds(without: int) -> tuple[float, float] | None:
        gap = full.copy()
        gap[500 : 500 + without] = 0
        return closure_interval(student, direct, gap)

    whole, some = bounds(0), bounds(20)
    assert whole == pytest.approx((0.025, 0.975), abs=0.002)
    assert some == pytest.approx((0.005, 0.995), abs=0.002)
    assert bounds(40) is None
