"""Examples -> what an encoder reads.

    one column     [CLS] text [SEP]                 token types 0
    two columns    [CLS] first [SEP] second [SEP]   token types 0, and 1 from the second text on

These are the columns as they stand, without a prompt, as BERT is fine-tuned everywhere. What is too long loses its
end, of a pair always the longer text.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from .tasks import Example


class SegmentSequences(Dataset):
    """Encoded examples: ``input_ids``, ``token_type_ids``, ``attention_mask`` and the class as ``labels``.

    ``transformers.DataCollatorWithPadding`` makes batches of them: ``[B, T]`` int64, and labels ``[B]``.
    """

    def __init__(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> None:
        # A copy: a tokenizer remembers how it truncated, and would be saved with that.
        encoded = deepcopy(tokenizer)(
            *map(list, zip(*(example.segments for example in examples), strict=True)),
            truncation="longest_first",
            max_length=max_length,
            return_token_type_ids=True,
            return_attention_mask=True,
        )
        self.items: list[dict[str, Any]] = [
            {key: encoded[key][row] for key in encoded} | {"labels": example.label}
            for row, example in enumerate(examples)
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]

    @property
    def lengths(self) -> list[int]:
        """Tokens of every example."""
        return [len(item["input_ids"]) for item in self.items]
