"""The sample order: permutations that (seed, epoch) decide, with similar lengths batched if asked, and how any number
of processes shares it.
"""

import itertools
import random

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from bitdistill.config import SftConfig
from bitdistill.errors import TrainingError
from bitdistill.train.batches import LENGTH_WINDOW, SeededOrder, global_batch


def order(
    size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    batch_size: int = 4,
    lengths: list[int] | None = None,
) -> list[int]:
    return SeededOrder(size, seed, batch_size=batch_size, steps=1, lengths=lengths).epoch(epoch)


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
    sampler = SeededOrder(50, 1, batch_size=4, steps=30, lengths=some_lengths(50))
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
def test_steps_are_whole_length_groups_but_where_an_epoch_ends(size):
    lengths = some_lengths(size)
    for epoch in range(5):
        indices = order(size, epoch=epoch, batch_size=4, lengths=lengths)
        begun = -epoch * size % 4  # samples that complete the last step of the epoch before
        # A group that straddled two sorted ones would not be sorted itself.
        for group in batches(indices[begun:], 4):
            assert [lengths[index] for index in group] == sorted(lengths[index] for index in group)


@given(
    size=st.integers(1, 90),
    batch_size=st.integers(1, 40),
    epochs=st.integers(1, 4),
    by_length=st.booleans(),
)
def test_epochs_follow_each_other_and_every_step_is_full(size, batch_size, epochs, by_length):
    lengths = some_lengths(size) if by_length else None
    steps = -(-epochs * size // batch_size)
    indices = list(SeededOrder(size, 3, batch_size=batch_size, steps=steps, lengths=lengths))
    assert len(indices) == steps * batch_size
    for epoch in range(epochs):
        assert sorted(indices[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(
    size=st.integers(1, 90),
    batch_size=st.integers(1, 6),
    accumulation=st.integers(1, 4),
    begun_with=st.integers(1, 4),
    processes=st.integers(1, 8),
    by_length=st.booleans(),
)
def test_any_number_of_processes_takes_the_same_samples_in_every_step(
    size, batch_size, accumulation, begun_with, processes, by_length
):
    """Through accelerate's own way of giving micro-batches to processes."""
    assume(batch_size * accumulation * begun_with % processes == 0)
    config = SftConfig(batch_size=batch_size, gradient_accumulation_steps=accumulation)
    lengths = some_lengths(size) if by_length else None

    def steps_of(division) -> list[list[int]]:
        sampler = SeededOrder(size, 3, batch_size=division.size, steps=7, lengths=lengths)
        micro = BatchSampler(sampler, division.batch_size, drop_last=False)
        shards = [
            list(BatchSamplerShard(micro, division.processes, rank)) for rank in range(division.processes)
        ]
        assert {len(shard) for shard in shards} == {7 * division.accumulation}
        return [
            sorted(
                index
                for shard in shards
                for batch in shard[step * division.accumulation : (step + 1) * division.accumulation]
                for index in batch
            )
            for step in range(7)
        ]

    begun, now = (global_batch(config, begun_with, count) for count in (begun_with, processes))
    assert (begun.batch_size, begun.accumulation) == (batch_size, accumulation)
    assert now.batch_size <= batch_size
    assert steps_of(now) == steps_of(begun)


def test_processes_that_cannot_share_the_global_batch_are_refused_with_numbers_that_can():
    config = SftConfig(batch_size=8, gradient_accumulation_steps=3)
    with pytest.raises(TrainingError) as refused:
        global_batch(config, 1, 5)
    assert "5 processes cannot share a global batch of 24 sequences" in str(refused.value)
    assert "Start 4 or 6 to continue it" in str(refused.value)


def test_windows_are_drawn_from_the_random_order_not_from_neighbouring_indices():
    size = 4 * LENGTH_WINDOW * 4
    lengths = [1] * size
    first_window = order(size, lengths=lengths, seed=2)[:4]
    assert max(first_window) - min(first_window) > 4 * LENGTH_WINDOW / 4


@given(size=st.integers(1, 30), steps=st.integers(1, 30), seed=st.integers(0, 9))
def test_numbered_samples_say_their_epoch(size, steps, seed):
    plain = SeededOrder(size, seed, batch_size=4, steps=steps)
    numbered = SeededOrder(size, seed, batch_size=4, steps=steps, numbered=True)
    pairs = [divmod(number, size) for number in numbered]
    assert [index for _, index in pairs] == list(plain)
    assert [epoch for epoch, _ in pairs] == [i // size for i in range(len(plain))]
