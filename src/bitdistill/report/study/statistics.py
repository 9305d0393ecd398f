"""Means, spreads and a paired bootstrap in two levels, items and seeds.

Of a method with seeds ``s = 1..S`` and items ``i = 1..N``, ``x[s, i]`` is what an item scored. Its score is the mean
over both. One draw of the bootstrap (Efron 1979; in two levels, as for clustered data) takes

    i*_1..i*_N  from 1..N with replacement: the same for every method and seed, which answered the same items,
    s*_1..s*_S  from the seeds with replacement: the same for every method that has these seeds,

and the mean over both again. A difference of two methods is taken draw by draw, so that what is hard for both cancels.
Intervals are percentiles of the draws. With one seed only items are resampled; with three, the second level is coarse:
resampled seeds have (S - 1) / S of the variance of the mean.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

DRAWS = 4000
RNG_SEED = 20251013
LEVEL = 0.95
BLOCK = 256
"""Draws that are made at once: a block of item counts takes 256 x N x 8 bytes."""

Draws = NDArray[np.float64]
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Interval:
    """A value with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


def mean(values: tuple[float, ...]) -> float:
    """Arithmetic mean."""
    return float(np.mean(values))


def deviation(values: tuple[float, ...]) -> float | None:
    """Sample standard deviation, sqrt(sum (x - mean)^2 / (S - 1)); None of one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def resampled_means(
    samples: Mapping[K, tuple[tuple[int, ...], NDArray[Any]]], draws: int = DRAWS
) -> dict[K, Draws]:
    """Resampled means ``[draws]`` of every sample; draw ``d`` is the same items for all of them.

    Args:
        samples: seeds, and what their items scored, ``[seeds, items]``; all have the same number of items.
        draws: how many.
    """
    if not samples:
        return {}
    stacked = np.concatenate([items for _, items in samples.values()]).astype(np.float64)
    means = _over_items(stacked, draws)
    found, start = {}, 0
    for key, (seeds, items) in samples.items():
        own = means[:, start : start + len(items)]
        start += len(items)
        # A generator of its own for each set of seeds: a sample more changes no other sample's draws.
        picks = np.random.default_rng([RNG_SEED, *seeds]).integers(len(seeds), size=(draws, len(seeds)))
        found[key] = np.take_along_axis(own, picks, axis=1).mean(axis=1)
    return found


def _over_items(stacked: Draws, draws: int) -> Draws:
    """``[draws, rows]`` means over resampled items of ``stacked``, ``[rows, items]``."""
    num_items = stacked.shape[1]
    rng = np.random.default_rng(RNG_SEED)
    means = np.empty((draws, len(stacked)))
    for start in range(0, draws, BLOCK):
        size = min(BLOCK, draws - start)
        drawn = rng.integers(num_items, size=(size, num_items)) + num_items * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * num_items).reshape(size, num_items)
        means[start : start + size] = counts @ stacked.T / num_items
    return means


def interval(value: float, draws: Draws) -> Interval:
    """A value with the percentile interval of its draws."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def closure_interval(student: Draws, direct: Draws, full: Draws) -> tuple[float, float] | None:
    """Bounds of (student - direct) / (full - direct).

    A draw without a gap says nothing about closure and counts as beyond either bound; None where such draws are so
    many that a bound is one of them.
    """
    gap = full - direct
    has_gap = gap > 0
    closed = np.divide(student - direct, gap, out=np.zeros_like(gap), where=has_gap)
    low = np.quantile(np.where(has_gap, closed, -np.inf), (1 - LEVEL) / 2, method="lower")
    high = np.quantile(np.where(has_gap, closed, np.inf), (1 + LEVEL) / 2, method="higher")
    return (float(low), float(high)) if np.isfinite([low, high]).all() else None
