"""Examples -> token ids, padded batches and labels.

Prompt and answer are tokenised apart and joined, so the answer's tokens are the same whatever precedes them.
A prompt that is too long loses its beginning, or the end of its document where the task has one: then what stands
behind the document is tokenised apart and always stays. Free-text answers end with the end-of-text token.
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

    def answer(self, text: str, longest: int = 0) -> list[int]:
        """Ids of an answer or label, which may be used up to ``longest`` tokens if that is given.

        Raises:
            DataError: it has no tokens, or too many to leave room for a prompt.
        """
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise DataError(f"answer {text!r} has no tokens; a label or target must not be empty")
        used = min(len(ids), longest or len(ids))
        if used + len(self.prefix) + 1 > self.max_length:
            raise DataError(
                f"answer of {used} tokens leaves no room for a prompt; raise task.max_length "
                f"(now {self.max_length})"
            )
        return list(ids)

    def prompts(self, examples: Sequence[Example], room: int) -> list[list[int]]:
        """Ids of the prompts, each leaving ``room`` tokens for the answer.

        Raises:
            DataError: there is no room for a prompt, or a prompt has no tokens.
        """
        if not examples:
            return []
        limit = self.max_length - len(self.prefix) - room
        texts = sorted({e.tail for e in examples})
        tails = dict(zip(texts, self._ids(texts), strict=True))
        if limit - max(map(len, tails.values())) < 1:
            raise DataError(
                f"answers of up to {room} tokens leave no room for a prompt; raise task.max_length "
                f"(now {self.max_length}) or lower task.max_new_tokens"
            )
        prompts = []
        for example, ids in zip(examples, self._ids([e.prompt for e in examples]), strict=True):
            tail = tails[example.tail]
            kept = ids[: limit - len(tail)] + tail if example.tail else ids[-limit:]
            if not self.prefix + kept:
                raise DataError(
                    f"prompt {example.prompt!r} has no tokens; a model needs something to go on: "
                    "check task.template and the data"
                )
            prompts.append(self.prefix + kept)
        return prompts

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        rows = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [list(ids) for ids in rows]

    def examples(self, examples: Sequence[Example], *, end: bool, longest: int = 0) -> list[Encoded]:
        """Ids of whole examples.

        Args:
            examples: the examples.
            end: append the end-of-text token to answers.
            longest: cut answers to so many tokens; one that was cut has no end-of-text token. 0 cuts none.
        """
        suffix = [self.tokenizer.eos_token_id] if end else []
        answers = {}
        for text in {e.answer for e in examples}:
            ids = self.answer(text, longest)
            answers[text] = ids[:longest] if 0 < longest < len(ids) else ids + suffix
        room = max(len(ids) for ids in answers.values())
        prompts = self.prompts(examples, room)
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
