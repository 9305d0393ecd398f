"""A seeded grammar: a small general corpus and a sentiment task, generated, so that nothing need be downloaded.

A review is a chain of clauses about things. Every adjective has a weight from -3 to 3; "slightly" counts once,
no adverb twice, "very" three times; a negation turns the clause round; what follows a "but" counts double; what
somebody else said does not count. The task is whether the sum is above zero, so words, scope, order and holder
have to be weighed against each other: a model may be nearly right, and precision shows.

The corpus tells of people, places and things and ends reviews with a feeling that grows with the same sum ("So
Ann was delighted ."), so a base pre-trained on it knows the words and what follows from them.

Frozen: changing anything here changes every committed result of the demo.
"""

import random
from collections.abc import Iterator
from typing import Any

ADJECTIVES = {
    3: ("superb", "splendid", "delicious", "brilliant", "perfect", "gorgeous"),
    2: ("lovely", "charming", "elegant", "cheerful", "friendly", "tasty"),
    1: ("tidy", "fresh", "quiet", "decent", "polite", "cosy"),
    -1: ("plain", "dull", "chilly", "noisy", "clumsy", "damp"),
    -2: ("shabby", "rude", "stale", "gloomy", "sour", "dirty"),
    -3: ("awful", "dreadful", "horrid", "rotten", "filthy", "hostile"),
}
DEGREES = (("slightly ", 1), ("", 2), ("very ", 3))
NEGATIONS = ("not ", "never ", "hardly ")
THINGS = ("soup", "bread", "room", "garden", "music", "host", "bed", "view", "tea", "play", "street", "cake")
PEOPLE = ("Ann", "Ben", "Cora", "Dan", "Eve", "Finn", "I", "I")
PLACES = ("inn", "castle", "cafe", "theatre", "farm", "hotel")
VERBS = ("walked", "travelled", "returned")
FEELINGS = (
    (-14, ("furious", "miserable")),
    (-5, ("sad", "cross")),
    (0, ("bored", "uneasy")),
    (5, ("calm", "content")),
    (14, ("glad", "happy")),
    (10_000, ("delighted", "thrilled")),
)
"""Upper bound of the sum -> words for it."""

CORPUS_DOCUMENTS = 2400
SENTENCES_PER_DOCUMENT = 12
TRAIN_ITEMS = 8000
TEST_ITEMS = 4000
_CORPUS_SEED, _TRAIN_SEED, _TEST_SEED = 20251013, 20251014, 20251015


class _Writer:
    """Draws texts from one random stream."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def pick(self, options: tuple[str, ...]) -> str:
        return self.rng.choice(options)

    def clause(self) -> tuple[str, int]:
        """A clause and what it counts."""
        weight = self.rng.choice(tuple(ADJECTIVES))
        degree, times = self.rng.choice(DEGREES)
        negation, sign = (self.pick(NEGATIONS), -1) if self.rng.random() < 0.2 else ("", 1)
        text = f"the {self.pick(THINGS)} was {negation}{degree}{self.pick(ADJECTIVES[weight])}"
        return text, sign * times * weight

    def review(self) -> tuple[str, int]:
        """Two to four clauses and their sum."""
        count = self.rng.randint(2, 4)
        turn = self.rng.randint(1, count - 1) if self.rng.random() < 0.5 else count
        text, total = self.clause()
        for index in range(1, count):
            clause, value = self.clause()
            text += f" , {'but' if index == turn else 'and'} {clause}"
            total += value * (2 if index >= turn else 1)
        if self.rng.random() < 0.25:
            clause, _ = self.clause()
            text += f" , though {self.pick(PEOPLE[:-2])} said that {clause}"
        if self.rng.random() < 0.5:
            text = f"at the {self.pick(PLACES)} {text}"
        return text, total

    def sentence(self) -> str:
        """A corpus sentence."""
        person = self.pick(PEOPLE)
        if self.rng.random() < 0.15:
            return f"{person} {self.pick(VERBS)} to the {self.pick(PLACES)} with {self.pick(PEOPLE)} ."
        if self.rng.random() < 0.3:
            text, total = self.clause()
            return f"{text} . So {person} was {self.pick(feelings(2 * total))} ."
        text, total = self.review()
        return f"{text} . So {person} was {self.pick(feelings(total))} ."


def feelings(total: int) -> tuple[str, ...]:
    """Words for how a review of this sum leaves its writer."""
    return next(words for bound, words in FEELINGS if total <= bound)


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
    """Reviews with a sum other than 0, half of them good."""
    writer = _Writer(seed)
    rows: list[dict[str, Any]] = []
    seen = set(exclude)
    while len(rows) < count:
        review, total = writer.review()
        text, label = f"{review} .", int(total > 0)
        if total == 0 or label != len(rows) % 2 or text in seen:
            continue
        seen.add(text)
        rows.append({"text": text, "label": label})
    return rows
