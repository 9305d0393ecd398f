"""The generated task against a reader of its rule, written from the module's description alone:

what decides is what the writer thought, or the clause behind a "but", or the only clauses there are; "not", "never",
"hardly" and "far from" turn an adjective round; what somebody else said does not count.
"""

import re
import subprocess
import sys

import pytest

from bitdistill.data import grammar
from bitdistill.data.corpus import read_documents
from bitdistill.config import CorpusConfig

NEGATION = re.compile(r"\b(not|never|hardly|far from)\b")


def clause_is_good(clause: str) -> bool:
    """One adjective, turned round by a negation."""
    words = set(clause.split())
    good, bad = words & set(grammar.GOOD), words & set(grammar.BAD)
    assert len(good) + len(bad) == 1, clause
    return bool(good) != bool(NEGATION.search(clause))


def left_glad(text: str, holder: str) -> bool:
    """How a text left its holder."""
    thought = re.search(rf"\b{holder} thought that ([^,.]*)", text)
    if thought:
        return clause_is_good(thought.group(1))
    if ", but " in text:
        return clause_is_good(text.split(", but ")[1])
    verdicts = {clause_is_good(clause) for clause in text.split(", and ")}
    assert len(verdicts) == 1, text
    return verdicts.pop()


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return {split: grammar.task_rows(split) for split in ("train", "test")}


@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_follow_the_stated_rule(rows, split):
    wrong = [row for row in rows[split] if left_glad(row["text"], "I") != bool(row["label"])]
    assert wrong == []


@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_are_balanced(rows, split):
    labels = [row["label"] for row in rows[split]]
    assert set(labels) == {0, 1}
    assert sum(labels) * 2 == len(labels)


def test_the_test_set_is_large_and_no_text_occurs_twice(rows):
    assert len(rows["test"]) >= 4000
    texts = [row["text"] for split in rows.values() for row in split]
    assert len(texts) == len(set(texts))


def test_no_test_text_occurs_in_the_corpus(rows):
    corpus = " ".join(text for _, text in grammar.corpus_documents())
    assert [row["text"] for row in rows["test"] if row["text"] in corpus] == []


def test_rows_are_the_same_in_another_process(rows):
    code = (
        "import hashlib, json; from bitdistill.data import grammar; "
        "print(hashlib.sha256(json.dumps([grammar.task_rows('train'), grammar.task_rows('test'), "
        "list(grammar.corpus_documents())]).encode()).hexdigest())"
    )
    outputs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
        for env in ({"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2"})
    }
    assert len(outputs) == 1


def test_counting_good_and_bad_words_is_not_enough(rows):
    """A reader that only counts words is right on clearly fewer texts than the rule's reader."""

    def count(text: str) -> bool:
        words = text.split()
        return sum(w in grammar.GOOD for w in words) > sum(w in grammar.BAD for w in words)

    right = sum(count(row["text"]) == bool(row["label"]) for row in rows["test"])
    assert right / len(rows["test"]) < 0.7


def test_feelings_in_the_corpus_follow_the_opinions():
    """Statements "TEXT . So NAME was FEELING ." and "NAME was FEELING because TEXT ." obey the rule of the task."""
    checked = 0
    for _, document in grammar.corpus_documents():
        for text, name, feeling in re.findall(r"(?:^|\. )([^.]*) \. So (\w+) was (\w+) \.", document):
            assert feeling in (grammar.PLEASED if left_glad(text, name) else grammar.UPSET), text
            checked += 1
        for feeling, text in re.findall(r"\w+ was (\w+) because ([^.]*) \.", document):
            assert feeling in (grammar.PLEASED if clause_is_good(text) else grammar.UPSET), text
            checked += 1
    assert checked > 5000


def test_the_corpus_holds_every_word_of_the_task(rows):
    corpus = {word for _, text in grammar.corpus_documents() for word in text.split()}
    task = {word for split in rows.values() for row in split for word in row["text"].split()}
    assert task - corpus <= {"I"}


def test_documents_have_distinct_names_and_can_be_limited():
    names = [name for name, _ in grammar.corpus_documents()]
    assert len(set(names)) == len(names)
    limited = list(read_documents(CorpusConfig(source="grammar", max_documents=7)))
    assert limited == list(grammar.corpus_documents())[:7]
