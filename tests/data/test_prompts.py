"""Prompts and answers as token ids, and the padded batches made of them."""

import pytest
import torch

from bitdistill.data.prompts import Encoded, PaddedBatch, PromptEncoder, TaskSequences
from bitdistill.data.tasks import Example
from bitdistill.errors import DataError

IGNORED = -100


def example(prompt: str, answer: str) -> Example:
    return Example(prompt, answer, None)


def test_prompt_and_answer_are_tokenised_apart(tokenizer):
    encoder = PromptEncoder(tokenizer, 64)
    encoded = encoder.examples([example("the soup was", " good"), example("x", " bad")], end=False)
    assert [e.prompt for e in encoded] == [tokenizer.encode("the soup was"), tokenizer.encode("x")]
    assert [e.answer for e in encoded] == [tokenizer.encode(" good"), tokenizer.encode(" bad")]


def test_a_generation_answer_ends_with_the_end_of_text(tokenizer):
    encoder = PromptEncoder(tokenizer, 64)
    (encoded,) = encoder.examples([example("the soup", " good .")], end=True)
    assert encoded.answer == [*tokenizer.encode(" good ."), tokenizer.eos_token_id]


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("max_length", [9, 12, 40])
def test_a_long_prompt_loses_its_beginning_and_no_example_is_too_long(tokenizer, max_length, end):
    prompt = " ".join(f"{i}" for i in range(30))
    ids = tokenizer.encode(prompt)
    assert len(ids) > max_length
    encoder = PromptEncoder(tokenizer, max_length)
    encoded = encoder.examples([example(prompt, "abc"), example("x", "abcdef")], end=end)
    assert len(encoded[1].answer) == 6 + end
    for item in encoded:
        assert len(item) <= max_length
    room = max_length - 6 - end  # every prompt leaves room for the longest answer
    assert encoded[0].prompt == ids[-room:]


def test_an_answer_that_leaves_no_room_is_an_error(tokenizer):
    with pytest.raises(DataError, match="no room for a prompt"):
        PromptEncoder(tokenizer, 8).examples([example("x", "abcdefgh")], end=False)
    with pytest.raises(DataError, match="no room for a prompt"):
        PromptEncoder(tokenizer, 8).examples([example("x", "abcdefg")], end=True)
    (encoded,) = PromptEncoder(tokenizer, 8).examples([example("xyz", "abcdefg")], end=False)
    assert tokenizer.decode(encoded.prompt + encoded.answer) == "zabcdefg"


def test_batches_are_padded_on_the_right_and_only_answers_are_labelled():
    batch = PaddedBatch(9)([Encoded([1, 2, 3], [4, 5]), Encoded([6], [7])])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [6, 7, 9, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [
        [IGNORED, IGNORED, IGNORED, 4, 5],
        [IGNORED, 7, IGNORED, IGNORED, IGNORED],
    ]
    assert all(value.dtype == torch.int64 for value in batch.values())


def test_sequences_know_their_lengths():
    sequences = TaskSequences([Encoded([1, 2], [3]), Encoded([4], [5])])
    assert sequences.lengths == [3, 2]
    assert sequences[1] == Encoded([4], [5])


def test_a_long_document_loses_its_end_and_what_stands_around_it_stays(tokenizer):
    document = " ".join(f"{i}" for i in range(30))
    head, tail = "Sum up: ", "\nTL;DR:"
    whole, end = tokenizer.encode(head + document), tokenizer.encode(tail)
    assert len(whole) > 40
    encoder = PromptEncoder(tokenizer, 40)
    prompts = encoder.prompts([Example(head + document, "", None, tail), Example("short", "", None, tail)], 5)
    assert prompts == [whole[: 40 - 5 - len(end)] + end, tokenizer.encode("short") + end]
    with pytest.raises(DataError, match="no room for a prompt"):
        encoder.prompts([Example(head + document, "", None, tail)], 40 - len(end))


def test_a_long_summary_is_cut_and_a_cut_one_has_no_end(tokenizer):
    encoder = PromptEncoder(tokenizer, 12)
    examples = [example("x", "abcdefghijklmnop"), example("x", "abcd"), example("x", "ab")]
    encoded = encoder.examples(examples, end=True, longest=4)
    letters = tokenizer.encode("abcd")
    assert len(letters) == 4
    assert [e.answer for e in encoded] == [letters, [*letters, 0], [*letters[:2], 0]]
    assert tokenizer.eos_token_id == 0
