"""The tasks of GLUE that BitDistill is judged on: SST-2, QNLI, MNLI.

GLUE keeps the labels of its test sets, so everybody reports the development set. MNLI has two, from the genres of
its training data (matched, the one usually quoted) and from others (mismatched).
"""

from collections.abc import Sequence

from .rows import Published, Row, Source, sharing

HUB = "nyu-mll/glue"


def sentences_around(rows: Sequence[Row]) -> list[tuple[int, ...]]:
    """The sentences around every SST-2 row: indices of the texts that hold it and are in no longer text themselves.

    SST-2's training rows are phrases cut from its sentences, so a random split would put a phrase on one side and
    the sentence around it on the other. Nor can everything that nests be one group: through short phrases ("the
    film") all but 8 rows of 67,349 hang together. So a phrase belongs to every sentence that holds it, and one of
    sentences on both sides is dropped (2.4 % of the rows): no text of one side then holds a text of the other.
    """
    texts = [tuple(str(row["sentence"]).split()) for row in rows]
    around: dict[tuple[str, ...], list[int]] = {text: [] for text in texts}
    for index in sorted(range(len(texts)), key=lambda i: -len(texts[i])):
        words = texts[index]
        if around[words]:  # in a longer text, or the same as an earlier one
            continue
        phrases = {
            words[start:end] for start in range(len(words)) for end in range(start + 1, len(words) + 1)
        }
        for phrase in phrases | {words}:
            if phrase in around:
                around[phrase].append(index)
    return [tuple(around[text]) for text in texts]


SST2 = Source(
    read=Published(hub=(HUB, "sst2"), split="validation", stems=("dev", "validation")),
    groups=sentences_around,
    template="{sentence} It was",
    columns=("sentence",),
    labels=(" terrible", " great"),
    label_column="label",
)

QNLI = Source(
    read=Published(hub=(HUB, "qnli"), split="validation", stems=("dev", "validation")),
    # A question comes with several sentences of its passage and a sentence with several questions; what hangs
    # together through either is a passage or a part of one.
    groups=sharing("question", "sentence"),
    template='{sentence}\nDoes this answer the question "{question}"?',
    columns=("question", "sentence"),
    labels=(" yes", " no"),
    values=("entailment", "not_entailment"),
    label_column="label",
)


def _mnli(which: str) -> Source:
    return Source(
        read=Published(
            hub=(HUB, "mnli"),
            split=f"validation_{which}",
            stems=(f"dev_{which}", f"validation_{which}"),
            columns={"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"},
        ),
        groups=sharing("premise"),  # each premise was given three hypotheses, one of every label
        template='{premise}\nThen "{hypothesis}" is',
        columns=("premise", "hypothesis"),
        labels=(" true", " unknown", " false"),
        values=("entailment", "neutral", "contradiction"),
        label_column="label",
    )


MNLI = _mnli("matched")
MNLI_MISMATCHED = _mnli("mismatched")
