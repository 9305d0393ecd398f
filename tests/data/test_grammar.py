"""The generated task against a reader of its rule, written from the module's description alone:

an adjective leans to one side and says the contrary of two kinds of things; a review is good if more of
its three things please than displease; what happens in the corpus agrees with that.
"""

import itertools
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from bitdistill.config import CorpusConfig
from bitdistill.data import grammar
from bitdistill.data.corpus import read_documents

KIND_OF = {thing: kind for kind, things in grammar.KINDS.items() for thing in things}
PLEASES = {"pleased", "delighted", "liked", "enjoyed"}
DISPLEASES = {"bored", "annoyed", "hated", "disliked"}


def things(text: str) -> list[tuple[str, str]]:
    """(adjective, thing) of every thing that a text names."""
    return re.findall(r"the (\w+) (\w+)", text)


def is_pleasing(adjective: str, thing: str) -> bool:
    leans = adjective in grammar.PLEASING
    return leans != (KIND_OF[thing] in grammar.EXCEPTIONS[adjective])


def is_good(text: str) -> bool:
    return sum(1 if is_pleasing(*pair) else -1 for pair in things(text)) > 0


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return {split: grammar.task_rows(split) for split in ("train", "test")}


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return [text for _, text in grammar.corpus_documents()]


@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_follow_the_stated_rule(rows, split):
    assert all(len(things(row["text"])) == 3 for row in rows[split])
    assert [row for row in rows[split] if is_good(row["text"]) != bool(row["label"])] == []


@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_are_balanced(rows, split):
    labels = [row["label"] for row in rows[split]]
    assert set(labels) == {0, 1}
    assert sum(labels) * 2 == len(labels)


def test_the_test_set_is_large_and_no_text_occurs_twice(rows):
    assert len(rows["test"]) >= 4000
    texts = [row["text"] for split in rows.values() for row in split]
    assert len(texts) == len(set(texts))


def test_both_sides_and_all_kinds_are_alike():
    """No kind of thing, and no side, is better off: only pairs of words tell."""
    assert len(grammar.PLEASING) == len(grammar.DISPLEASING)
    for side in (grammar.PLEASING, grammar.DISPLEASING):
        turned = Counter(kind for adjective in side for kind in grammar.EXCEPTIONS[adjective])
        assert set(turned) == set(grammar.KINDS)
        assert len(set(turned.values())) == 1


def test_single_words_are_not_enough(rows):
    """A reader that counts leanings alone is often wrong, and so is one that reads one thing only."""

    def lean(text: str) -> bool:
        return sum(1 if adjective in grammar.PLEASING else -1 for adjective, _ in things(text)) > 0

    def share_right(reader) -> float:
        right = sum(reader(row["text"]) == bool(row["label"]) for row in rows["test"])
        return right / len(rows["test"])

    assert share_right(lean) < 0.8
    for position in range(3):
        assert share_right(lambda text, p=position: is_pleasing(*things(text)[p])) < 0.85


def test_what_happens_in_the_corpus_agrees_with_the_pairs(corpus):
    pairs = set()
    for sentence in itertools.chain.from_iterable(text.split(" .") for text in corpus):
        if not sentence:
            continue
        words = set(sentence.split())
        assert bool(words & PLEASES) != bool(words & DISPLEASES)
        assert {is_pleasing(*pair) for pair in things(sentence)} == {bool(words & PLEASES)}
        pairs |= set(things(sentence))
    assert len(pairs) == len(grammar.EXCEPTIONS) * len(KIND_OF)  # the corpus tells of every pair


def test_the_corpus_holds_every_word_of_the_task(rows, corpus):
    known = {word for text in corpus for word in text.split()}
    task = {word for split in rows.values() for row in split for word in row["text"].split()}
    task |= {"bored", "pleased", "me"}
    assert task <= known


def test_rows_and_documents_are_the_same_in_another_process():
    code = (
        "import hashlib, json; from bitdistill.data import grammar; "
        "print(hashlib.sha256(json.dumps([grammar.task_rows('test'), "
        "[grammar.corpus_documents().__next__() for _ in range(3)]]).encode()).hexdigest())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_documents_have_distinct_names_and_can_be_limited():
    documents = list(grammar.corpus_documents())
    assert len({name for name, _ in documents}) == len(documents)
    assert list(read_documents(CorpusConfig(source="grammar", max_documents=7))) == documents[:7]
