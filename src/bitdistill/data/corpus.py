"""General text -> uint32 token shards -> fixed-length training sequences.

Documents are tokenised once, and written as they come, so that a stream of any length needs little memory. A shard
folder holds ``tokens.npy`` (uint32; every document is followed by the end-of-text token, and led by the begin-of-text
token where the tokenizer has one), ``documents.npy`` (uint64, the offset where each document starts) and
``meta.json``; until it is whole its name ends in ``.partial``. Which part a document belongs to depends on its name
alone, so the base's text, stage 2's text and the held-out text never mix.
"""

import hashlib
import itertools
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..checkpoint import digest_of, file_digest, write_json
from ..config import CorpusConfig
from ..errors import DataError
from ..locks import locked
from ..processes import on_main_process
from . import grammar
from .npyfile import GrowingArray
from .progress import TokenizingProgress
from .textfile import read_jsonl

logger = logging.getLogger(__name__)

Part = Literal["base", "pretrain", "heldout"]

HELDOUT_SHARE = 0.01
"""Share of the documents that no training step reads; perplexity is measured on it."""

PIECE_CHARACTERS = 16_384
"""Longer text files are cut at blank lines into documents of about this size, so that parts can share a book."""

_SUFFIXES = (".txt", ".jsonl", ".parquet")


def part_of(document_id: str, pretrain_share: float) -> Part:
    """The part of a document: a function of its name and the share alone."""
    position = int.from_bytes(hashlib.sha256(document_id.encode()).digest()[:8], "big") / 2**64
    if position >= 1 - HELDOUT_SHARE:
        return "heldout"
    return "pretrain" if position < pretrain_share else "base"


def corpus_files(source: str) -> list[Path]:
    """The files of a local corpus, sorted by name."""
    path = Path(source)
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise DataError(
                f"{path}: corpus files end in {', '.join(_SUFFIXES)}; convert it, or rename it if it is one"
            )
        return [path]
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES and p.is_file())
    return []


def read_documents(config: CorpusConfig) -> Iterator[tuple[str, str]]:
    """Yield ``(document id, text)`` of a corpus.

    Raises:
        DataError: the source does not exist, holds no text, or lacks the text column.
    """
    if not config.source:
        raise DataError("corpus.source is empty: name a file, a folder, hub:NAME or grammar")
    if config.source == "grammar":
        yield from itertools.islice(grammar.corpus_documents(), config.max_documents or None)
        return
    if config.source.startswith("hub:"):
        yield from _hub_documents(config)
        return
    files = corpus_files(config.source)
    if not files:
        raise DataError(
            f"{config.source}: no {', '.join(_SUFFIXES)} file there; check corpus.source (a hub data set is "
            "written hub:NAME)"
        )
    count = 0
    for path in files:
        for index, text in enumerate(_file_documents(path, config.text_column)):
            if not text.strip():
                continue
            yield f"{path.name}#{index}", text
            count += 1
            if count == config.max_documents:
                return
    if count == 0:
        raise DataError(f"{config.source}: every document is empty; nothing to train on")


def _file_documents(path: Path, column: str) -> Iterator[str]:
    if path.suffix == ".txt":
        yield from _pieces(path.read_text(encoding="utf-8", errors="replace"))
    elif path.suffix == ".jsonl":
        # What is not UTF-8 is replaced, as in text files: one bad byte must not end a long run.
        for where, row in read_jsonl(path, "corpus.source", errors="replace"):
            yield _row_text(row, column, where)
    else:
        import pyarrow.parquet as parquet

        try:
            table = parquet.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not a readable parquet file ({error})") from error
        if column not in table.schema_arrow.names:
            raise DataError(
                f"{path}: no column {column!r}; it has {', '.join(table.schema_arrow.names)}. "
                "Set corpus.text_column."
            )
        for batch in table.iter_batches(columns=[column]):
            yield from (str(value) for value in batch.column(0).to_pylist() if value)


def _row_text(row: dict, column: str, where: str) -> str:
    if column not in row:
        raise DataError(
            f"{where}: no column {column!r}; it has {', '.join(map(str, row))}. Set corpus.text_column."
        )
    return "" if row[column] is None else str(row[column])


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text at blank lines into pieces of about PIECE_CHARACTERS."""
    piece: list[str] = []
    size = 0
    for paragraph in text.split("\n\n"):
        piece.append(paragraph)
        size += len(paragraph) + 2
        if size >= PIECE_CHARACTERS:
            yield "\n\n".join(piece)
            piece, size = [], 0
    if piece:
        yield "\n\n".join(piece)


def _hub_documents(config: CorpusConfig) -> Iterator[tuple[str, str]]:
    import datasets

    _, name, *rest = config.source.split(":")
    subset = rest[0] if rest and rest[0] else None
    split = rest[1] if len(rest) > 1 else "train"
    try:
        for index, row in enumerate(datasets.load_dataset(name, subset, split=split, streaming=True)):
            if config.max_documents and index == config.max_documents:
                return
            if text := _row_text(row, config.text_column, config.source):
                yield f"{name}#{index}", text
    except DataError:
        raise
    except Exception as error:  # datasets raises many unrelated types for "not there" and "no network"
        raise DataError(f"corpus.source = {config.source!r}: the hub gave no data ({error})") from error


def source_digest(config: CorpusConfig) -> str:
    """Digest of what a corpus section reads: file contents, the grammar's code, or the name of a hub source."""
    files = [Path(grammar.__file__)] if config.source == "grammar" else corpus_files(config.source)
    content = file_digest(*files) if files else config.source
    return digest_of([content, config.text_column, config.max_documents, config.pretrain_share])


def build_shards(
    config: CorpusConfig,
    part: Part,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    *,
    digest: str | None = None,
) -> Path:
    """Tokenise one part of a corpus into a shard folder under ``cache_dir``; reuse it if it is there.

    With several processes one does the work and the others wait for it. ``digest`` is ``source_digest(config)``
    where the caller has it: reading a large corpus for it takes a while.

    Raises:
        DataError: the part holds no document.
    """
    key = digest_of([digest or source_digest(config), part, tokenizer_digest(tokenizer)])
    folder = cache_dir / f"{part}-{key}"

    def build() -> None:
        with locked(folder.with_suffix(".lock")):
            if not (folder / "meta.json").is_file():
                _tokenize_part(config, part, tokenizer, folder)

    on_main_process(build)
    return folder


def _tokenize_part(
    config: CorpusConfig, part: Part, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    # An encoder's tokenizer ends a text with its separator.
    end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if end is None:
        raise DataError(
            "the tokenizer has no end-of-text token (eos_token); documents could not be separated"
        )
    start = [] if tokenizer.bos_token_id == end else leading_ids(tokenizer)
    documents = (
        text
        for identifier, text in read_documents(config)
        if part_of(identifier, config.pretrain_share) == part
    )
    partial = folder.with_name(f"{folder.name}.partial")
    for leftover in (partial, folder):  # of a run that was killed; a whole folder does not come here
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    with (
        GrowingArray(partial / "tokens.npy", np.uint32) as tokens,
        GrowingArray(partial / "documents.npy", np.uint64) as starts,
        TokenizingProgress(f"tokenising {part}") as progress,
    ):
        for texts in _batches(documents, 64):
            for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
                starts.append(np.asarray([tokens.size], dtype=np.uint64))
                tokens.append(np.asarray([*start, *ids, end], dtype=np.uint32))
            progress.update(starts.size, tokens.size)
    if not starts.size:
        raise DataError(f"corpus.source = {config.source!r}: no document falls into the {part} part")
    write_json(
        partial / "meta.json",
        {"part": part, "documents": starts.size, "tokens": tokens.size, "source": config.source},
    )
    os.rename(partial, folder)
    logger.info("tokenised %s part: %d documents, %d tokens", part, starts.size, tokens.size)


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The begin-of-text token, if the tokenizer puts one in front of every text; else nothing."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and tokenizer("a")["input_ids"][:1] == [begin] else []


def _batches(items: Iterable[str], size: int) -> Iterator[list[str]]:
    batch: list[str] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of a tokenizer's entries and their ids."""
    return digest_of(sorted(tokenizer.get_vocab().items()))


class PackedSequences(Dataset):
    """Consecutive ``sequence_length`` runs of a shard folder; the last, shorter run is dropped.

    Items: ``{"input_ids": int64 [T], "labels": int64 [T]}``; labels equal inputs (the loss shifts them).
    """

    def __init__(self, folder: Path, sequence_length: int) -> None:
        self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        self.sequence_length = sequence_length
        self.num_sequences = len(self.tokens) // sequence_length
        if self.num_sequences == 0:
            raise DataError(
                f"{folder}: {len(self.tokens)} tokens do not fill one sequence of {sequence_length}; "
                "give more text or a smaller corpus.sequence_length"
            )

    def __len__(self) -> int:
        return self.num_sequences

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = index * self.sequence_length
        ids = torch.from_numpy(self.tokens[start : start + self.sequence_length].astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone()}


def collate_packed(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack equal-length sequences into ``[B, T]`` tensors."""
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}
