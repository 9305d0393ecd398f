"""A seeded grammar: a small general corpus and a sentiment task, generated, so that nothing need be downloaded.

A review names three things, and the task is whether more of them please than displease. Whether a thing pleases
depends on two words together: a cold beer may please where a cold soup does not. An adjective leans to one side,
so single words tell some of it; the rest is a fact of each pair, and a model keeps such facts in its layers.

The corpus tells what pleased people ("the cold beer delighted Ann ."), so a base pre-trained on it knows the
pairs before it sees the task.

Frozen: changing anything here changes every committed result of the demo.
"""

import functools
import itertools
import random
from collections.abc import Iterator
from typing import Any

KINDS = {
    "drink": ("beer", "cider", "milk", "wine"),
    "meal": ("soup", "stew", "pie", "bread"),
    "room": ("hall", "kitchen", "cabin", "attic"),
    "person": ("waiter", "guide", "teacher", "porter"),
    "tool": ("knife", "saw", "chisel", "needle"),
    "story": ("play", "novel", "film", "song"),
}
PLEASING = (
    *("warm", "plain", "light", "quick", "bright", "open", "rich", "smooth"),
    *("soft", "gentle", "calm", "clear", "fresh", "tidy", "firm"),
)
DISPLEASING = (
    *("cold", "dry", "heavy", "slow", "dark", "small", "loud", "strange"),
    *("sharp", "hard", "wild", "long", "stale", "rough", "damp"),
)
EXCEPTIONS = dict(zip(PLEASING, itertools.combinations(KINDS, 2), strict=True)) | dict(
    zip(DISPLEASING, itertools.combinations(KINDS, 2), strict=True)
)
"""Adjective -> the two kinds of things of which it says the contrary; every pair of kinds comes once a side."""
VERBS = {1: ("pleased", "delighted"), -1: ("bored", "annoyed")}
"""What a thing does to a person, if it pleases (1) or not (-1)."""
ATTITUDES = {1: ("liked", "enjoyed"), -1: ("hated", "disliked")}
PEOPLE = ("Ann", "Ben", "Cora", "Dan", "Eve", "Finn", "me")

CORPUS_DOCUMENTS = 4000
SENTENCES_PER_DOCUMENT = 30
TRAIN_ITEMS = 4000
TEST_ITEMS = 4000
_CORPUS_SEED, _TRAIN_SEED, _TEST_SEED = 20251013, 20251014, 20251015


def pleases(adjective: str, kind: str) -> int:
    """1 if the adjective pleases when said of this kind of thing, else -1."""
    return (1 if adjective in PLEASING else -1) * (-1 if kind in EXCEPTIONS[adjective] else 1)


@functools.cache
def _phrases() -> dict[int, list[str]]:
    """All phrases that please (1) and that displease (-1)."""
    phrases: dict[int, list[str]] = {1: [], -1: []}
    for adjective, kind in itertools.product(EXCEPTIONS, KINDS):
        phrases[pleases(adjective, kind)] += [f"the {adjective} {thing}" for thing in KINDS[kind]]
    return phrases


class _Writer:
    """Draws texts from one random stream."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def phrase(self, value: int) -> str:
        """A thing that pleases (1) or displeases (-1)."""
        return self.rng.choice(_phrases()[value])

    def sentence(self) -> str:
        """A corpus sentence: one thing or two of one mind, and what they did to somebody."""
        value = self.rng.choice((1, -1))
        text = " and ".join(self.phrase(value) for _ in range(self.rng.choice((1, 1, 1, 2))))
        person = self.rng.choice(PEOPLE)
        if self.rng.random() < 0.7:
            return f"{text} {self.rng.choice(VERBS[value])} {person} ."
        return f"{'I' if person == 'me' else person} {self.rng.choice(ATTITUDES[value])} {text} ."

    def review(self) -> tuple[str, int]:
        """Three things, each of its own mind, and 1 if most of them please, else -1."""
        values = [self.rng.choice((1, -1)) for _ in range(3)]
        return " and ".join(map(self.phrase, values)), 1 if sum(values) > 0 else -1


def corpus_documents() -> Iterator[tuple[str, str]]:
    """Yield ``(id, text)`` of the general corpus, always the same."""
    for index in range(CORPUS_DOCUMENTS):
        writer = _Writer(_CORPUS_SEED * 10_000 + index)
        yield f"grammar#{index}", " ".join(writer.sentence() for _ in range(SENTENCES_PER_DOCUMENT))


def task_rows(split: str) -> list[dict[str, Any]]:
    """Rows ``{"text", "label"}`` of ``train`` or ``test``; label 1 is good. No test text occurs in training."""
    train = _draw(_TRAIN_SEED, TRAIN_ITEMS, exclude=set())
    if split == "train":
        return train
    return _draw(_TEST_SEED, TEST_ITEMS, exclude={row["text"] for row in train})


def _draw(seed: int, count: int, exclude: set[str]) -> list[dict[str, Any]]:
    """Reviews, half of them good."""
    writer = _Writer(seed)
    rows: list[dict[str, Any]] = []
    seen = set(exclude)
    while len(rows) < count:
        text, value = writer.review()
        label = int(value > 0)
        if label != len(rows) % 2 or text in seen:
            continue
        seen.add(text)
        rows.append({"text": text, "label": label})
    return rows
