"""The generated task against a reader of its rule, written from the module's description alone:

each adjective has a weight; "slightly" counts once, no adverb twice, "very" three times; a negation turns the
clause round; what follows a "but" counts double; what somebody else said does not count; good is above zero.
"""

import itertools
import os
import re
import subprocess
import sys

import pytest

from bitdistill.config import CorpusConfig
from bitdistill.data import grammar
from bitdistill.data.corpus import read_documents

WEIGHTS = {word: weight for weight, words in grammar.ADJECTIVES.items() for word in words}
TIMES = {"slightly": 1, "very": 3}


def clause_sum(clause: str) -> int:
    """Weight of the one adjective, times its adverb, turned round by a negation."""
    words = clause.split()
    (weight,) = (WEIGHTS[word] for word in words if word in WEIGHTS)
    (times,) = {TIMES[word] for word in words if word in TIMES} or {2}
    negated = any(word in ("not", "never", "hardly") for word in words)
    return -weight * times if negated else weight * times


def review_sum(text: str) -> int:
    own = re.sub(r", though \w+ said that [^,.]*", "", text)
    before, _, behind = own.partition(", but ")
    sums = [[clause_sum(c) for c in part.split(", and ")] if part else [0] for part in (before, behind)]
    return sum(sums[0]) + 2 * sum(sums[1])


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return {split: grammar.task_rows(split) for split in ("train", "test")}


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return [text for _, text in grammar.corpus_documents()]


@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_follow_the_stated_rule(rows, split):
    wrong = [row for row in rows[split] if (review_sum(row["text"]) > 0) != bool(row["label"])]
    assert wrong == []


@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_are_balanced_and_no_sum_is_zero(rows, split):
    labels = [row["label"] for row in rows[split]]
    assert set(labels) == {0, 1}
    assert sum(labels) * 2 == len(labels)
    assert all(review_sum(row["text"]) for row in rows[split])


def test_the_test_set_is_large_and_no_text_occurs_twice(rows):
    assert len(rows["test"]) >= 4000
    texts = [row["text"] for split in rows.values() for row in split]
    assert len(texts) == len(set(texts))


def test_weights_of_words_are_not_enough(rows):
    """A reader that adds weights but misses adverbs, negations, the but and the holder is often wrong."""

    def add(text: str) -> bool:
        return sum(WEIGHTS.get(word, 0) for word in text.split()) > 0

    right = sum(add(row["text"]) == bool(row["label"]) for row in rows["test"])
    assert right / len(rows["test"]) < 0.85


def test_the_first_and_the_last_clause_alone_are_not_enough(rows):
    for position in (0, -1):
        right = sum(
            (clause_sum(re.split(r", (?:and|but|though) ", row["text"])[position]) > 0) == bool(row["label"])
            for row in rows["test"]
        )
        assert right / len(rows["test"]) < 0.85


def test_feelings_in_the_corpus_grow_with_the_same_sum(corpus):
    ranks = {word: rank for rank, (_, words) in enumerate(grammar.FEELINGS) for word in words}
    seen = []
    for document in corpus:
        sentences = document.removesuffix(" .").split(" . ")
        for text, verdict in itertools.pairwise(sentences):
            if not verdict.startswith("So "):
                continue
            feeling = verdict.split()[-1]
            single = not re.search(r", (and|but|though) ", text)
            seen.append((review_sum(text) * (2 if single else 1), ranks[feeling]))
    assert len(seen) > 20_000
    limits = [
        (
            min(total for total, rank in seen if rank == wanted),
            max(total for total, rank in seen if rank == wanted),
        )
        for wanted in range(len(grammar.FEELINGS))
    ]
    assert all(high < low for (_, high), (low, _) in itertools.pairwise(limits))
    assert limits[2][1] == 0  # the bored half ends where the content half begins


def test_the_corpus_holds_every_word_of_the_task(rows, corpus):
    known = {word for text in corpus for word in text.split()}
    task = {word for split in rows.values() for row in split for word in row["text"].split()}
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
