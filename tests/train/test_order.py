"""The sample order: a permutation that (seed, epoch) decides, with similar lengths batched if asked."""

import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitdistill.train.batches import LENGTH_WINDOW, SeededOrder


def order(
    size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    batch_size: int = 4,
    lengths: list[int] | None = None,
) -> list[int]:
    sampler = SeededOrder(size, seed, batch_size, lengths)
    sampler.set_epoch(epoch)
    assert len(sampler) == size
    return list(sampler)


def some_lengths(size: int) -> list[int]:
    generator = random.Random(3)
    return [generator.randint(5, 500) for _ in range(size)]


def batches(indices: list[int], batch_size: int) -> list[list[int]]:
    return [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]


@given(
    size=st.integers(1, 400),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 50),
    by_length=st.booleans(),
)
def test_every_index_comes_exactly_once(size, batch_size, seed, epoch, by_length):
    lengths = some_lengths(size) if by_length else None
    indices = order(size, seed=seed, epoch=epoch, batch_size=batch_size, lengths=lengths)
    assert sorted(indices) == list(range(size))


@pytest.mark.parametrize("lengths", [None, some_lengths(300)], ids=["random", "by_length"])
def test_order_is_a_function_of_seed_and_epoch(lengths):
    first = order(300, seed=5, epoch=2, lengths=lengths)
    assert order(300, seed=5, epoch=2, lengths=lengths) == first
    assert order(300, seed=5, epoch=3, lengths=lengths) != first
    assert order(300, seed=6, epoch=2, lengths=lengths) != first
    assert first != sorted(first)


def test_iterating_twice_gives_the_same_epoch_and_consumes_no_global_randomness():
    sampler = SeededOrder(50, 1, 4, some_lengths(50))
    torch.manual_seed(11)
    first = list(sampler)
    drawn = torch.rand(1)
    torch.manual_seed(12)
    assert list(sampler) == first
    torch.manual_seed(11)
    assert torch.equal(torch.rand(1), drawn)


def test_any_index_may_come_first():
    assert {order(5, seed=seed)[0] for seed in range(60)} == set(range(5))


def test_a_batch_holds_similar_lengths():
    size, batch_size = 4 * LENGTH_WINDOW * 5, 4
    lengths = some_lengths(size)

    def spread(indices: list[int]) -> float:
        groups = [[lengths[index] for index in batch] for batch in batches(indices, batch_size)]
        return sum(max(group) - min(group) for group in groups) / len(groups)

    # Four neighbours of 128 sorted values span about 3 / 129 of the range of 495; four at random 3 / 5.
    assert spread(order(size, batch_size=batch_size, lengths=lengths)) < 20
    assert spread(order(size, batch_size=batch_size)) > 200


def test_batches_of_similar_lengths_come_in_random_order():
    size, batch_size = 4 * LENGTH_WINDOW, 4
    lengths = some_lengths(size)
    indices = order(size, batch_size=batch_size, lengths=lengths)
    shortest = [min(lengths[index] for index in batch) for batch in batches(indices, batch_size)]
    rises = sum(later > earlier for earlier, later in itertools.pairwise(shortest))
    assert 0.25 * len(shortest) < rises < 0.75 * len(shortest)


@pytest.mark.parametrize("size", [3, 130, 4 * LENGTH_WINDOW * 2 + 7])
def test_the_short_batch_comes_last_and_the_others_are_whole_length_groups(size):
    lengths = some_lengths(size)
    for epoch in range(5):
        indices = order(size, epoch=epoch, batch_size=4, lengths=lengths)
        groups = batches(indices, 4)
        assert [len(group) for group in groups[:-1]] == [4] * (len(groups) - 1)
        # A group that straddled two sorted ones would not be sorted itself.
        for group in groups:
            assert [lengths[index] for index in group] == sorted(lengths[index] for index in group)


def test_windows_are_drawn_from_the_random_order_not_from_neighbouring_indices():
    size = 4 * LENGTH_WINDOW * 4
    lengths = [1] * size
    first_window = order(size, lengths=lengths, seed=2)[:4]
    assert max(first_window) - min(first_window) > 4 * LENGTH_WINDOW / 4
