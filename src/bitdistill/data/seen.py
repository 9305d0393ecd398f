"""The data of a task as texts and token ids, whole: what its vocabulary is chosen by, and what that is judged on."""

import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from ..config import CorpusConfig
from .corpus import leading_ids, read_documents
from .prompts import PromptEncoder
from .tasks import Example, Task

BATCH = 1024
"""Examples or texts that are tokenised together."""


def example_ids(
    task: Task, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[int]]:
    """Prompt and answer of every example, as the task's fine-tune encodes them, but never cut short."""
    encoder = PromptEncoder(tokenizer, sys.maxsize)
    for start in range(0, len(examples), BATCH):
        for encoded in encoder.examples(examples[start : start + BATCH], end=task.kind != "classification"):
            yield encoded.prompt + encoded.answer


def text_ids(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Every text, led as every text is led."""
    prefix = leading_ids(tokenizer)
    remaining = iter(texts)
    while batch := list(itertools.islice(remaining, BATCH)):
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            yield [*prefix, *ids]


def documents(source: CorpusConfig) -> Iterator[str]:
    """The documents of text files, as stage 2 would read them."""
    return (text for _, text in read_documents(source))


def held_out_texts(source: CorpusConfig) -> list[str]:
    """Texts to judge on: a row of JSONL or parquet, a line of a text file. Blank ones are passed over."""
    found: list[str] = []
    for identifier, text in read_documents(source):
        name, _, _ = identifier.rpartition("#")
        found += text.splitlines() if name.endswith(".txt") else [text]
    return [text for text in found if text.strip()]
