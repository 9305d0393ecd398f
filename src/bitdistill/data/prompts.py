"""Examples -> token ids, padded batches and labels.

Prompt and answer are tokenised apart and joined, so the answer's tokens are the same whatever precedes them.
A prompt that is too long loses its beginning. Generation answers end with the end-of-text token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from .corpus import leading_ids
from .tasks import Example

IGNORE_INDEX = -100
"""Label of tokens that are not to be predicted (the Hugging Face convention)."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example."""

    prompt: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


class PromptEncoder:
    """Tokenise prompts and answers for one tokenizer and length limit."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.prefix = leading_ids(tokenizer)

    def answer(self, text: str) -> list[int]:
        """Ids of an answer or label.

        Raises:
            DataError: it has no tokens, or too many to leave room for a prompt.
        """
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise DataError(f"answer {text!r} has no tokens; a label or target must not be empty")
        if len(ids) + len(self.prefix) + 1 > self.max_length:
            raise DataError(
                f"answer of {len(ids)} tokens leaves no room for a prompt; raise task.max_length "
                f"(now {self.max_length})"
            )
        return list(ids)

    def prompts(self, texts: Sequence[str], room: int) -> list[list[int]]:
        """Ids of prompts, each leaving ``room`` tokens for the answer.

        Raises:
            DataError: there is no room for a prompt, or a prompt has no tokens.
        """
        if not texts:
            return []
        limit = self.max_length - len(self.prefix) - room
        if limit < 1:
            raise DataError(
                f"answers of up to {room} tokens leave no room for a prompt; raise task.max_length "
                f"(now {self.max_length}) or lower task.max_new_tokens"
            )
        rows = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        prompts = [self.prefix + list(ids[-limit:]) for ids in rows]
        if not all(prompts):
            raise DataError(
                f"prompt {texts[prompts.index([])]!r} has no tokens; a model needs something to go on: "
                "check task.template and the data"
            )
        return prompts

    def examples(self, examples: Sequence[Example], *, end: bool) -> list[Encoded]:
        """Ids of whole examples; ``end`` appends the end-of-text token to answers."""
        suffix = [self.tokenizer.eos_token_id] if end else []
        answers = {text: self.answer(text) + suffix for text in {e.answer for e in examples}}
        room = max(len(ids) for ids in answers.values())
        prompts = self.prompts([e.prompt for e in examples], room)
        return [
            Encoded(prompt, answers[example.answer])
            for prompt, example in zip(prompts, examples, strict=True)
        ]


class TaskSequences(Dataset):
    """Training sequences of a task; only the answer's tokens are labelled."""

    def __init__(self, encoded: list[Encoded]) -> None:
        self.encoded = encoded

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> Encoded:
        return self.encoded[index]

    @property
    def lengths(self) -> list[int]:
        """Tokens of every sequence."""
        return [len(item) for item in self.encoded]


class PaddedBatch:
    """Collate ``Encoded`` items into right-padded ``[B, T]`` int64 tensors."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, items: list[Encoded]) -> dict[str, torch.Tensor]:
        length = max(len(item) for item in items)
        input_ids = torch.full((len(items), length), self.pad_id)
        attention_mask = torch.zeros(len(items), length, dtype=torch.int64)
        labels = torch.full((len(items), length), IGNORE_INDEX)
        for row, item in enumerate(items):
            input_ids[row, : len(item)] = torch.tensor(item.prompt + item.answer)
            attention_mask[row, : len(item)] = 1
            labels[row, len(item.prompt) : len(item)] = torch.tensor(item.answer)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
