"""Masked text for an encoder: the frame, the shares of BERT's paper, and masks that a resume finds again."""

import numpy as np
import pytest
import torch
from tiny_encoders import SPECIAL, VOCABULARY

from bitdistill.config import CorpusConfig
from bitdistill.data.corpus import build_shards
from bitdistill.data.masked import FramedSequences, MaskedSequences
from bitdistill.errors import DataError

CLS, SEP, MASK = (SPECIAL.index(token) for token in ("[CLS]", "[SEP]", "[MASK]"))
LENGTH = 32


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """20,000 tokens, none of them special but the separators of documents."""
    folder = tmp_path_factory.mktemp("shards")
    tokens = np.random.default_rng(0).integers(len(SPECIAL), VOCABULARY, 20_000).astype(np.uint32)
    tokens[99::100] = SEP
    np.save(folder / "tokens.npy", tokens)
    return folder


def test_shards_of_an_encoder_separate_documents_by_its_separator(encoder_project, wordpieces, tmp_path):
    config = CorpusConfig(source=str(encoder_project.parent / "prose.jsonl"), pretrain_share=1.0)
    folder = build_shards(config, "pretrain", wordpieces, tmp_path)
    tokens = np.load(folder / "tokens.npy")
    starts = np.load(folder / "documents.npy").astype(int)
    assert (tokens == SEP).sum() == len(starts)
    assert set(np.flatnonzero(tokens == SEP) + 1) == {*starts[1:], len(tokens)}
    assert CLS not in tokens
    assert wordpieces.decode(tokens[: starts[1] - 1]).count("the") == 4


def test_sequences_are_consecutive_runs_in_a_frame(shards, wordpieces):
    sequences = FramedSequences(shards, LENGTH, wordpieces)
    tokens = np.load(shards / "tokens.npy")
    assert len(sequences) == len(tokens) // (LENGTH - 2)
    for index in (0, 1, len(sequences) - 1):
        run = tokens[index * (LENGTH - 2) : (index + 1) * (LENGTH - 2)].tolist()
        assert sequences[index]["input_ids"].tolist() == [CLS, *run, SEP]


def test_a_text_that_fills_no_sequence_is_an_error(shards, wordpieces):
    with pytest.raises(DataError, match="do not fill one sequence"):
        FramedSequences(shards, 30_000, wordpieces)


def test_masks_have_the_shares_of_the_paper(shards, wordpieces):
    sequences = MaskedSequences(shards, LENGTH, wordpieces, seed=0)
    plain = FramedSequences(shards, LENGTH, wordpieces)
    inputs = torch.stack([sequences[i]["input_ids"] for i in range(len(sequences))])
    labels = torch.stack([sequences[i]["labels"] for i in range(len(sequences))])
    ids = torch.stack([plain[i]["input_ids"] for i in range(len(sequences))])
    chosen = labels != -100

    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(inputs[~chosen], ids[~chosen])
    assert not chosen[ids < len(SPECIAL)].any()

    real = int((ids >= len(SPECIAL)).sum())
    count = int(chosen.sum())
    masked = inputs[chosen] == MASK
    random = (inputs[chosen] != labels[chosen]) & ~masked

    def near(share: float, of: int) -> object:
        return pytest.approx(share, abs=4 * (share * (1 - share) / of) ** 0.5)

    assert count / real == near(0.15, real)
    assert float(masked.float().mean()) == near(0.8 + 0.1 / VOCABULARY, count)
    # One in VOCABULARY random tokens is the token itself, one the mask.
    assert float(random.float().mean()) == near(0.1 * (1 - 2 / VOCABULARY), count)
    assert len(inputs[chosen][random].unique()) > VOCABULARY / 2


def test_masks_are_a_function_of_seed_epoch_and_index(shards, wordpieces):
    def items(seed: int, epoch: int, order: range) -> dict[int, tuple[list[int], list[int]]]:
        sequences = MaskedSequences(shards, LENGTH, wordpieces, seed)
        found = {i: sequences[epoch * len(sequences) + i] for i in order}
        return {i: (item["input_ids"].tolist(), item["labels"].tolist()) for i, item in found.items()}

    first = items(3, 2, range(40))
    torch.manual_seed(99)
    assert items(3, 2, range(39, -1, -1)) == first
    different = [
        sum(other[i] != first[i] for i in first) for other in (items(4, 2, range(40)), items(3, 1, range(40)))
    ]
    assert different == [40, 40]
    # Neighbours do not share their masks either, whichever way seed, epoch and index add up.
    patterns = {
        tuple(label != -100 for label in labels)
        for seed, epoch in ((0, 1), (1, 0))
        for _, labels in items(seed, epoch, range(20)).values()
    }
    assert len(patterns) == 40
