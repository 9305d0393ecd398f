"""Text for an encoder: token shards -> framed sequences -> masked ones.

A sequence is ``[CLS] run [SEP]``, all of one segment, where the run is what comes next in the shards. Documents there
are separated by ``[SEP]``, and a run may cross from one into the next.

Masking is BERT's (arXiv 1810.04805, section 3.1): 15 % of the tokens are to be predicted, of which 80 % become
``[MASK]``, 10 % any token of the vocabulary and 10 % stay. Special tokens are never among them.
"""

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from .corpus import PackedSequences


class FramedSequences(Dataset):
    """``{"input_ids": int64 [T]}``: consecutive runs of ``T - 2`` tokens between ``[CLS]`` and ``[SEP]``."""

    def __init__(self, folder: Path, sequence_length: int, tokenizer: PreTrainedTokenizerBase) -> None:
        self.runs = PackedSequences(folder, sequence_length - 2)
        self.begin = torch.tensor([tokenizer.cls_token_id])
        self.end = torch.tensor([tokenizer.sep_token_id])

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.cat([self.begin, self.runs[index]["input_ids"], self.end])}


class MaskedSequences(FramedSequences):
    """``{"input_ids": int64 [T], "labels": int64 [T]}``; labels are IGNORE_INDEX but for what is to be predicted.

    Every epoch masks anew: item ``epoch * len + index`` is the sequence ``index`` with the masks of that epoch. They are
    a function of (seed, epoch, index), so a resumed run sees the same, and so does any number of processes.
    """

    def __init__(
        self, folder: Path, sequence_length: int, tokenizer: PreTrainedTokenizerBase, seed: int
    ) -> None:
        super().__init__(folder, sequence_length, tokenizer)
        self.seed = seed
        self.masking = DataCollatorForLanguageModeling(tokenizer)
        self.masking.generator = torch.Generator()
        self.special = torch.tensor(tokenizer.all_special_ids)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        epoch, index = divmod(number, len(self))
        ids = super().__getitem__(index)["input_ids"][None]
        # Mixed, because torch's generator takes 32 bits: seed + epoch + index would repeat.
        mixed = np.random.SeedSequence((self.seed, epoch, index)).generate_state(1)
        self.masking.generator.manual_seed(int(mixed[0]))
        masked, labels = self.masking.torch_mask_tokens(ids, torch.isin(ids, self.special))
        return {"input_ids": masked[0], "labels": labels[0]}
