"""A seeded grammar: a small general corpus and a sentiment task, generated, so that nothing need be downloaded.

The corpus talks about people, places and what they are like; it uses every word of the task in plain statements
("the soup was awful, and Ann was sad"), so a base pre-trained on it knows which adjectives go together.
The task asks how a visit left the visitor. What decides is the last clause after a "but", or else the only one; a
negation turns it; "hardly" and "far from" negate too; an opinion that somebody else holds does not count.
So counting good and bad words is not enough: clause order, scope and holder have to be read.

Frozen: changing anything here changes every committed result of the demo.
"""

import random
from collections.abc import Iterator
from typing import Any

GOOD = (
    "lovely", "superb", "charming", "splendid", "delicious", "gentle", "bright", "tidy", "fresh", "cheerful",
    "warm", "graceful", "generous", "quiet", "tender", "crisp", "elegant", "friendly", "cosy", "honest",
    "radiant", "pleasant", "brilliant", "polite", "sweet", "tasty", "spotless", "lively", "kind", "golden",
    "merry", "handsome", "peaceful", "gracious", "witty", "noble", "dainty", "sunny", "helpful", "clever",
)  # fmt: skip
BAD = (
    "awful", "dreadful", "gloomy", "horrid", "bitter", "rude", "dull", "filthy", "stale", "dismal",
    "cold", "clumsy", "greedy", "noisy", "tough", "soggy", "shabby", "hostile", "damp", "false",
    "rotten", "nasty", "grim", "sour", "ugly", "tedious", "dirty", "cruel", "bleak", "mouldy",
    "dreary", "vulgar", "chaotic", "surly", "foul", "petty", "grubby", "murky", "useless", "silly",
)  # fmt: skip
THINGS = (
    "soup", "bread", "room", "garden", "music", "host", "waiter", "bed", "view", "tea", "street", "play",
    "market", "museum", "boat", "train", "library", "cake", "harbour", "concert",
)  # fmt: skip
PEOPLE = (
    "Ann", "Ben", "Cora", "Dan", "Eve", "Finn", "Gail", "Hugo", "Iris", "Jack", "Kate", "Leo", "Mona", "Ned",
)  # fmt: skip
PLACES = ("inn", "village", "castle", "cafe", "theatre", "farm", "school", "hotel", "valley", "island")
INTENSIFIERS = ("", "", "", "very ", "really ", "quite ", "rather ", "so ")
NEGATIONS = ("not ", "never ", "hardly ", "far from ")
PLEASED = ("glad", "happy", "pleased", "content")
UPSET = ("sad", "cross", "upset", "sorry")
VERBS = ("walked", "travelled", "hurried", "wandered", "rode", "returned")

CORPUS_DOCUMENTS = 2400
SENTENCES_PER_DOCUMENT = 12
TRAIN_ITEMS = 8000
TEST_ITEMS = 4000
_CORPUS_SEED, _TRAIN_SEED, _TEST_SEED = 20251013, 20251014, 20251015


class _Writer:
    """Draws sentences from one random stream."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def pick(self, options: tuple[str, ...]) -> str:
        return self.rng.choice(options)

    def opinion(self, good: bool) -> str:
        """A clause whose meaning is ``good``; one in three reaches it through a negation."""
        negated = self.rng.random() < 1 / 3
        adjective = self.pick(GOOD if good != negated else BAD)
        degree = self.pick(NEGATIONS) if negated else self.pick(INTENSIFIERS)
        return f"the {self.pick(THINGS)} was {degree}{adjective}"

    def review(self, good: bool) -> str:
        """A task text that leaves the visitor glad if ``good``."""
        shape = self.rng.randrange(5)
        if shape == 0:
            text = self.opinion(good)
        elif shape == 1:
            text = f"{self.opinion(not good)} , but {self.opinion(good)}"
        elif shape == 2:
            text = f"{self.opinion(good)} , and {self.opinion(good)}"
        elif shape == 3:
            other = self.opinion(self.rng.random() < 0.5)
            text = f"{self.pick(PEOPLE)} said that {other} , but I thought that {self.opinion(good)}"
        else:
            other = self.opinion(self.rng.random() < 0.5)
            text = f"I thought that {self.opinion(good)} , though {self.pick(PEOPLE)} said that {other}"
        place = f"at the {self.pick(PLACES)} "
        return f"{place if self.rng.random() < 0.5 else ''}{text} ."

    def sentence(self) -> str:
        """A corpus sentence; feelings follow opinions as they would in life."""
        person, good = self.pick(PEOPLE), self.rng.random() < 0.5
        feeling = self.pick(PLEASED if good else UPSET)
        shape = self.rng.randrange(6)
        if shape == 0:
            adjectives = GOOD if good else BAD
            first, second = self.rng.sample(adjectives, 2)
            return f"the {self.pick(THINGS)} of the {self.pick(PLACES)} was {first} and {second} ."
        if shape == 1:
            return f"{person} {self.pick(VERBS)} to the {self.pick(PLACES)} with {self.pick(PEOPLE)} ."
        if shape == 2:
            return f"{self.opinion(good)} , so {person} was {feeling} ."
        if shape == 3:
            return f"{person} was {feeling} because {self.opinion(good)} ."
        if shape == 4:
            return f"{self.opinion(not good)} , but {self.opinion(good)} , and {person} was {feeling} ."
        return f"{person} said that {self.opinion(good)} ."


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
    writer = _Writer(seed)
    rows: list[dict[str, Any]] = []
    seen = set(exclude)
    while len(rows) < count:
        label = len(rows) % 2
        text = writer.review(good=bool(label))
        if text not in seen:
            seen.add(text)
            rows.append({"text": text, "label": label})
    return rows
