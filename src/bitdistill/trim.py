"""A student with the part of its vocabulary that a task needs: rows of two tables, tokenizer, ids in its configs.

A small student is half embedding. Rows of tokens that the task's data never use only take space, and time in the head.
``data/vocabulary.py`` says which tokens stay and why the data keep theirs. Nothing is trained: a text whose tokens stay
has the hidden states it had, and of its logits the kept ones: only the softmax has fewer to share out among.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from .checkpoint import checkpoint_digest, write_json, write_text
from .config import CorpusConfig, Recipe
from .data.corpus import source_digest
from .data.prompts import PromptEncoder
from .data.seen import documents, example_ids, text_ids
from .data.tasks import Task, load_task
from .data.vocabulary import BpeVocabulary, Document, config_ids, renumbered_config
from .errors import CheckpointError, ConfigError, DataError
from .export import EMBEDDING, HEAD, check_finished
from .packed import CONFIG_FILE, WEIGHTS_FILE, read_json_object
from .processes import from_main_process
from .train.encoder import check_recipe
from .train.loading import is_encoder, load_config, load_model, load_tokenizer
from .train.size import model_size
from .train.step import run_step

MAPPING_FILE = "vocabulary.json"
"""Record of a trimmed folder: ``old_ids[new id]`` is the row that the source had it in."""

INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
TOKENIZER_FILE, TOKENIZER_CONFIG, GENERATION_FILE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
)
_COPIED = ("*.py", "LICEN[CS]E*", "NOTICE*")
"""What else belongs to a student; records of its training and evaluation stay with it."""


def run(
    source: str | Path,
    output: Path,
    *,
    recipe: Recipe | None = None,
    texts: Sequence[CorpusConfig] = (),
    size: int = 0,
    fill: CorpusConfig | None = None,
) -> Path:
    """Write ``source`` with the vocabulary that the data need to ``output``; returns the finished folder.

    Args:
        source: a decoder's checkpoint, ternary or full precision: folder or hub id.
        recipe: its task's training and validation examples are such data.
        texts: so are these.
        size: rows to fill up to; 0 adds none.
        fill: texts whose most frequent tokens fill first; then come those of the lowest merges.

    Raises:
        ConfigError: there are no data, or more tokens are needed than ``size``, or fewer there.
        DataError: the data are missing or empty.
        CheckpointError: the source does not load, is none that can be trimmed, or ``output`` holds something else.
    """
    if recipe is None and not texts:
        raise ConfigError("there are no data to choose tokens by: give --recipe, --text, or both")
    if size < 0:
        raise ConfigError(f"--size {size}: give the rows that the vocabulary is to have")
    if fill is not None and not size:
        raise ConfigError("--fill has the tokens that fill up to --size; give that too")
    check_finished(source, "trim")
    revision = recipe.revision_of(source) if recipe else None
    config = load_config(source, revision)
    if is_encoder(config):
        raise CheckpointError(
            f"{source} is an encoder ({config.model_type}), which reads WordPiece; trim takes decoders with BPE"
        )
    task = None
    if recipe is not None:
        check_recipe(recipe, config, distill=False)
        task = load_task(recipe.task)
    settings = {
        "stage": "trim",
        "source": checkpoint_digest(source, revision),
        "task_digest": task.digest if task else None,
        "texts": [source_digest(text) for text in texts],
        "size": size,
        "fill": source_digest(fill) if fill else None,
    }

    def trim(folder: Path) -> dict[str, Any]:
        try:
            return _trim(source, revision, folder, task, texts, size, fill)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)  # there is nothing in it to go on from
            raise

    def work(folder: Path) -> dict[str, Any]:
        return from_main_process(lambda: trim(folder))

    return run_step(Path(output), settings, work)


def _trim(
    source: str | Path,
    revision: str | None,
    folder: Path,
    task: Task | None,
    texts: Sequence[CorpusConfig],
    size: int,
    fill: CorpusConfig | None,
) -> dict[str, Any]:
    place = _local_folder(source, revision)
    tokenizer = load_tokenizer(source, revision)
    vocabulary = BpeVocabulary(_tokenizer_document(tokenizer, folder, source), str(source))
    config = read_json_object(place / CONFIG_FILE)
    generation = _read_if_there(place / GENERATION_FILE)
    rows = load_config(source, revision).vocab_size
    seen, examples = _seen(_encoded(tokenizer, task, texts))
    _check_rows(source, seen, vocabulary, rows)
    named = config_ids(config) | config_ids(generation)
    needed = vocabulary.closure(seen | {i for i in vocabulary.fixed() | named if i < rows})
    kept = _sized(vocabulary, needed, size, rows, _frequent(tokenizer, fill))
    old_ids = vocabulary.ordered(kept)
    # An added token without a row (Gemma's image token) keeps its place behind all rows.
    rowless = sorted(i for i in vocabulary.added.values() if i >= rows)
    new_ids = {old: new for new, old in enumerate([*old_ids, *rowless])}

    write_text(
        folder / TOKENIZER_FILE, json.dumps(vocabulary.trimmed(new_ids), ensure_ascii=False, indent=1) + "\n"
    )
    for name, values in ((TOKENIZER_CONFIG, _read_if_there(folder / TOKENIZER_CONFIG)),
                         (GENERATION_FILE, generation),
                         (CONFIG_FILE, config | {"vocab_size": len(old_ids)})):  # fmt: skip
        if values:
            write_json(folder / name, renumbered_config(values, new_ids, str(place / name)))
    _write_weights(place, folder, old_ids, rows)
    for pattern in _COPIED:
        for path in place.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    write_text(folder / MAPPING_FILE, json.dumps({"rows_before": rows, "old_ids": old_ids}) + "\n")
    write_text(folder / "README.md", _card(place, rows, len(old_ids), examples))

    trimmed = _checked_tokenizer(folder, vocabulary, old_ids)
    pairs = zip(_encoded(tokenizer, task, texts), _encoded(trimmed, task, texts), strict=True)
    if any(before != [old_ids[i] for i in after] for before, after in pairs):
        raise CheckpointError(
            f"{source}: the data do not come out as the same tokens from the trimmed tokenizer; its class "
            f"({type(tokenizer).__name__}) depends on tokens in a way that trim does not know. Leave it as it is"
        )
    model = load_model(folder)  # refuses what is damaged
    after = model_size(model)
    tables = 1 if model.config.tie_word_embeddings else 2
    gone = tables * (rows - len(old_ids)) * model.config.hidden_size
    return {
        "rows_before": rows,
        "rows": len(old_ids),
        "tokens_before": len(vocabulary.tokens),
        "examples": examples,
        "tokens_of_the_data": len(seen),
        "parameters_before": after.parameters + gone,
        "parameters": after.parameters,
        "bytes_before": after.bytes + 2 * gone,
        "bytes": after.bytes,
    }


# --- which tokens ---


def _encoded(
    tokenizer: PreTrainedTokenizerBase, task: Task | None, texts: Sequence[CorpusConfig]
) -> Iterator[list[int]]:
    """Everything that the vocabulary is chosen by."""
    if task is not None:
        yield from example_ids(task, (*task.train, *task.validation), tokenizer)
        encoder = PromptEncoder(tokenizer, 1 << 30)
        yield from (encoder.answer(label) for label in task.labels)  # one may be in no example
    for source in texts:
        yield from text_ids(documents(source), tokenizer)


def _seen(encoded: Iterator[list[int]]) -> tuple[set[int], int]:
    """The tokens that occur, and in how many texts."""
    seen: set[int] = set()
    count = 0
    for ids in encoded:
        seen.update(ids)
        count += 1
    if not seen:
        raise DataError("the data hold no token; give the texts that the model is to read")
    return seen, count


def _check_rows(source: str | Path, seen: set[int], vocabulary: BpeVocabulary, rows: int) -> None:
    beyond = sorted(i for i in seen if i >= rows)
    if beyond:
        raise CheckpointError(
            f"{source}: the data have token {beyond[0]} ({vocabulary.tokens.get(beyond[0])!r}), and the embedding has "
            f"{rows} rows; tokenizer and model do not belong together. Fetch or make the checkpoint again"
        )


def _frequent(tokenizer: PreTrainedTokenizerBase, fill: CorpusConfig | None) -> list[int]:
    """Tokens of the texts to fill with, the most frequent first; of equals the lower id."""
    counts: Counter[int] = Counter()
    if fill is not None:
        for ids in text_ids(documents(fill), tokenizer):
            counts.update(ids)
    return sorted(counts, key=lambda i: (-counts[i], i))


def _sized(
    vocabulary: BpeVocabulary, needed: set[int], size: int, rows: int, frequent: Sequence[int]
) -> set[int]:
    if not size:
        return needed
    if size < len(needed):
        raise ConfigError(
            f"--size {size}: the tokens of the data, special ones and those that spell any text are {len(needed)}; "
            "give at least so many, or leave it out"
        )
    kept = vocabulary.filled(needed, size, rows, frequent)
    if len(kept) < size:
        raise ConfigError(f"--size {size}: the tokenizer has only {len(kept)} tokens with a row; give fewer")
    return kept


# --- files ---


def _local_folder(source: str | Path, revision: str | None) -> Path:
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.md", *_COPIED]
    return Path(snapshot_download(str(source), revision=revision, allow_patterns=wanted))


def _tokenizer_document(tokenizer: PreTrainedTokenizerBase, folder: Path, source: str | Path) -> Document:
    """The tokenizer as it loads, which is what the model was trained with; saved in ``folder`` to be renumbered."""
    tokenizer.save_pretrained(folder)
    if not (folder / TOKENIZER_FILE).is_file():
        raise CheckpointError(
            f"{source}: its tokenizer has no tokenizer.json (the tokenizers library's form), which trim renumbers; "
            "convert the tokenizer with transformers' PreTrainedTokenizerFast"
        )
    return read_json_object(folder / TOKENIZER_FILE)


def _read_if_there(path: Path) -> Document:
    return read_json_object(path) if path.is_file() else {}


def _write_weights(place: Path, folder: Path, old_ids: list[int], rows: int) -> None:
    """The weight files with the rows of ``old_ids``; every other tensor as it was."""
    index = _read_if_there(place / INDEX_FILE)
    files = sorted(set(index["weight_map"].values())) if index else [WEIGHTS_FILE]
    chosen, total, found = torch.tensor(old_ids), 0, False
    for name in files:
        if not (place / name).is_file():
            raise CheckpointError(
                f"{place}: no {name} there; trim reads weights in safetensors files. Fetch the checkpoint again, or "
                "save the model anew with save_pretrained"
            )
        try:
            with safe_open(place / name, "pt") as file:
                metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(
                f"{place / name}: damaged ({error}); fetch or make the checkpoint again"
            ) from error
        for key in {EMBEDDING, HEAD} & tensors.keys():
            if len(tensors[key]) != rows:
                raise CheckpointError(
                    f"{place / name}: {key} has {len(tensors[key])} rows where config.json says vocab_size = {rows}; "
                    "the two files belong to different models. Fetch or make the checkpoint again"
                )
            tensors[key] = tensors[key][chosen]
            found = found or key == EMBEDDING
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        save_file(tensors, folder / name, metadata=metadata)
    if not found:
        raise CheckpointError(f"{place}: no {EMBEDDING} there; fetch or make the checkpoint again")
    if index:
        write_json(folder / INDEX_FILE, index | {"metadata": index["metadata"] | {"total_size": total}})


def _checked_tokenizer(
    folder: Path, vocabulary: BpeVocabulary, old_ids: Sequence[int]
) -> PreTrainedTokenizerBase:
    """The new tokenizer as it loads: every kept token has its new id, and no row has another.

    Raises:
        CheckpointError: it has not.
    """
    tokenizer = load_tokenizer(folder)
    found = {i: token for token, i in tokenizer.get_vocab().items() if i < len(old_ids)}
    wanted = {new: vocabulary.tokens[old] for new, old in enumerate(old_ids) if old in vocabulary.tokens}
    if found != wanted:
        wrong = min(i for i in found.keys() | wanted.keys() if found.get(i) != wanted.get(i))
        raise CheckpointError(
            f"{folder}: the trimmed tokenizer reads {found.get(wrong)!r} where it should have {wanted.get(wrong)!r} "
            f"(id {wrong}); its class ({type(tokenizer).__name__}) adds tokens of its own. Leave it as it is"
        )
    return tokenizer


def _card(place: Path, before: int, after: int, examples: int) -> str:
    """The student's model card, or the beginning of one, with what was done."""
    try:
        text = (place / "README.md").read_text(encoding="utf-8").rstrip()
    except (OSError, UnicodeDecodeError):
        text = "---\nlibrary_name: bitdistill\ntags: [bitdistill]\n---\n# Task model"
    lines = [
        text,
        "",
        "## Vocabulary",
        "",
        f"Trimmed by bitdistill from {before:,} rows to {after:,}: the tokens of {examples:,} texts, special tokens,",
        "and what spells any other text. A text unlike those takes more tokens than before. No weight was trained;",
        f"`{MAPPING_FILE}` has the row that each id had.",
    ]
    return "\n".join(lines) + "\n"
