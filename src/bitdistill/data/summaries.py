"""Summarisation: the CNN/DailyMail task, sentences, and the lead-3 baseline."""

import re

from .rows import Published, Source, sharing

_END = re.compile(r"""(?<=[.!?])["'\u201d\u2019)\]]*\s+(?=["'\u201c\u2018(\[]*[A-Z0-9])""")
_TITLES = "Mr|Mrs|Ms|Dr|Prof|St|Gen|Sen|Rep|Gov|Lt|Col|Sgt|Capt|Jr|Sr|No|vs"
_NO_END = re.compile(rf"\b(?:{_TITLES}|[A-Z]|[A-Z]\.[A-Z])\.$")
"""Ends in a full stop that is an initial's or an abbreviation's."""


def sentences(text: str) -> list[str]:
    """The sentences of a text: its lines, cut behind ``.``, ``!`` and ``?`` before a capital or a digit.

    Simple on purpose: it needs no model or download, and ROUGE-Lsum and lead-3 use the same rule on every text.
    The highlights of CNN/DailyMail have one sentence a line already.
    """
    found: list[str] = []
    for line in text.splitlines():
        start = 0
        for match in _END.finditer(line):
            if not _NO_END.search(line[start : match.start()]):
                found.append(line[start : match.end()])
                start = match.end()
        found.append(line[start:])
    return [sentence.strip() for sentence in found if sentence.strip()]


def lead(text: str, count: int = 3) -> str:
    """The first sentences of a text, one a line."""
    return "\n".join(sentences(text)[:count])


CNNDM = Source(
    read=Published(hub=("abisee/cnn_dailymail", "3.0.0"), split="test", stems=("test",)),
    groups=sharing("article"),
    template="{article}\nTL;DR:",
    label_column="highlights",
    document_column="article",
)
