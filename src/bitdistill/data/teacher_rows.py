"""What a teacher said of every training example, on disk: the layout of the shards, and reading them with a batch.

Examples are put in the order of their length and cut into shards of SHARD_TOKENS tokens. A shard is a safetensors file
of rows, example after example:

    teacher_hidden           [KD tokens, E] bf16        final hidden states (form ``hidden``)
    teacher_top              [KD tokens, k] int32       entries of the vocabulary (form ``topk``)
    teacher_top_log_p        [KD tokens, k] fp16        their log-probabilities at the temperature
    teacher_rest_log_p       [KD tokens] fp32           log of the mass of all others
    teacher_{q,k,v}.LAYER    [real tokens, heads, head width] bf16

Which rows an example has follows from the examples alone. Shards are mapped into memory: reading an example touches its
own rows only, in whatever order examples come.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import CheckpointError
from .prompts import Encoded, PaddedBatch, TaskSequences

SHARD_TOKENS = 1 << 15
"""Tokens of a shard at least, its last example included: what a kill while filling can lose."""

Rows = dict[str, Tensor]
_DIGEST = "digest"


def kd_count(item: Encoded, kd_tokens: str) -> int:
    """Tokens of an example that the logits KD counts; ``kd_tokens`` is ``distill.kd_tokens``."""
    return len(item) if kd_tokens == "all" else len(item.answer)


def examples_digest(sequences: TaskSequences) -> str:
    """Short digest of the token ids of all examples: of template, tokenizer, length limit and data at once."""
    state = hashlib.sha256()
    for item in sequences.encoded:
        for ids in (item.prompt, item.answer):
            state.update(np.asarray([len(ids), *ids], dtype="<i8").tobytes())
    return state.hexdigest()[:16]


@dataclass(frozen=True)
class _Place:
    """Where an example's rows are."""

    shard: int
    kd: slice
    real: slice


class RowPlan:
    """Which examples each shard holds, and which of its rows are whose: a function of the examples alone."""

    def __init__(self, sequences: TaskSequences, kd_tokens: str) -> None:
        self.sequences, self.kd_tokens = sequences, kd_tokens
        lengths = sequences.lengths
        order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
        self.shards: list[list[int]] = [[]]
        tokens = 0
        for index in order:
            if tokens >= SHARD_TOKENS:
                self.shards.append([])
                tokens = 0
            self.shards[-1].append(index)
            tokens += lengths[index]
        self.counts = [self._counts(shard) for shard in self.shards]
        """(KD tokens, real tokens) of each shard."""

    def _counts(self, shard: Sequence[int]) -> tuple[int, int]:
        items = [self.sequences[index] for index in shard]
        return sum(kd_count(item, self.kd_tokens) for item in items), sum(map(len, items))

    def batches(self, shard: int, tokens: int) -> Iterator[list[int]]:
        """A shard's examples in order, as many together as pad to ``tokens`` tokens; one at least."""
        batch: list[int] = []
        for index in self.shards[shard]:
            if batch and (len(batch) + 1) * len(self.sequences[index]) > tokens:
                yield batch
                batch = []
            batch.append(index)
        yield batch

    def places(self) -> list[_Place]:
        """Where the rows of each example are, by its index."""
        found: dict[int, _Place] = {}
        for shard, indices in enumerate(self.shards):
            kd = real = 0
            for index in indices:
                item = self.sequences[index]
                kd_end, real_end = kd + kd_count(item, self.kd_tokens), real + len(item)
                found[index] = _Place(shard, slice(kd, kd_end), slice(real, real_end))
                kd, real = kd_end, real_end
        return [found[index] for index in range(len(found))]


def shard_path(folder: Path, shard: int) -> Path:
    """File of one shard."""
    return folder / f"shard-{shard:05}.safetensors"


def is_of_states(name: str) -> bool:
    """Whether a tensor has a row for every real token, not for every token of the KD."""
    return name.startswith(("teacher_q.", "teacher_k.", "teacher_v."))


def write_shard(path: Path, rows: Rows) -> None:
    """Write a shard under a temporary name and rename it; a disk that fills keeps nothing of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(rows, temporary, metadata={_DIGEST: _rows_digest(rows)})
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)


def shard_fault(path: Path, counts: tuple[int, int], names: Sequence[str]) -> str | None:
    """What is wrong with a shard, all its bytes read; None if nothing is.

    Args:
        counts: its KD tokens and real tokens.
        names: tensors that it must hold.
    """
    try:
        with safe_open(path, framework="pt") as file:
            expected = (file.metadata() or {}).get(_DIGEST)
        rows = load_file(path)
    except FileNotFoundError:
        return "missing"
    except (OSError, SafetensorError) as error:
        return f"not readable, {' '.join(str(error).split())}"
    if not set(names) <= rows.keys() or any(len(rows[name]) != counts[is_of_states(name)] for name in names):
        return "of another shape"
    return None if _rows_digest(rows) == expected else "changed since it was written"


def _rows_digest(rows: Rows) -> str:
    state = hashlib.sha256()
    for name in sorted(rows):
        tensor = rows[name]
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        state.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return state.hexdigest()


@dataclass(frozen=True)
class TaughtExample:
    """An example and the rows that its teacher has on it."""

    encoded: Encoded
    rows: Rows


class TaughtSequences(Dataset):
    """Training sequences with their teacher's rows.

    Args:
        folder: a filled cache.
        names: tensors to read; the shards may hold more.

    Raises:
        CheckpointError: a shard is missing or cannot be opened.
    """

    def __init__(self, plan: RowPlan, folder: Path, names: Sequence[str]) -> None:
        self.sequences, self.places = plan.sequences, plan.places()
        self.shards: list[Rows] = []
        for shard in range(len(plan.shards)):
            path = shard_path(folder, shard)
            try:
                with safe_open(path, framework="pt") as file:
                    self.shards.append({name: file.get_tensor(name) for name in names})
            except (OSError, SafetensorError) as error:
                raise damaged_cache(path, str(error)) from error

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> TaughtExample:
        place = self.places[index]
        rows = {
            name: tensor[place.real if is_of_states(name) else place.kd]
            for name, tensor in self.shards[place.shard].items()
        }
        return TaughtExample(self.sequences[index], rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every sequence."""
        return self.sequences.lengths


class TaughtBatch:
    """Collate ``TaughtExample`` items: the padded batch, and beside it what the teacher said.

    Rows of KD tokens follow each other as the tokens do in the flattened batch, ``[N, ...]``; states are padded with
    zeros to ``[B, heads, T, width]``.
    """

    def __init__(self, pad_id: int) -> None:
        self.padded = PaddedBatch(pad_id)

    def __call__(self, items: list[TaughtExample]) -> dict[str, Tensor]:
        batch = self.padded([item.encoded for item in items])
        length = batch["input_ids"].shape[1]
        for name, first in items[0].rows.items():
            parts = [item.rows[name] for item in items]
            if not is_of_states(name):
                batch[name] = torch.cat(parts)
                continue
            states = first.new_zeros(len(items), length, *first.shape[1:])
            for row, part in enumerate(parts):
                states[row, : len(part)] = part
            batch[name] = states.transpose(1, 2)
        return batch


def damaged_cache(path: Path, what: str) -> CheckpointError:
    """The refusal of a cache that cannot be used as it is."""
    return CheckpointError(
        f"{path}: this part of the teacher cache is damaged ({' '.join(what.split())}); delete {path.parent} to "
        "fill it again, or fetch it again from where it was made"
    )
