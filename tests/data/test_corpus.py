"""Corpora: what the shards hold is the text that the files hold, whatever the format."""

import io
import json
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bitdistill.checkpoint import file_digest
from bitdistill.config import CorpusConfig
from bitdistill.data import corpus
from bitdistill.data.corpus import PackedSequences, build_shards, collate_packed, part_of, read_documents
from bitdistill.data.npyfile import GrowingArray
from bitdistill.errors import DataError

PARTS = ("base", "pretrain", "heldout")


def write(path: Path, texts: list[str]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.table({"text": texts, "other": list(range(len(texts)))}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts), encoding="utf-8")
    else:
        path.write_text("\n\n".join(texts), encoding="utf-8")
    return path


def some_texts(count: int) -> list[str]:
    return [f"document {i} :" + " soup" * (i % 7) for i in range(count)]


def stored_documents(folder: Path) -> list[list[int]]:
    """The token runs of a shard folder, cut at the stored offsets."""
    tokens, starts = np.load(folder / "tokens.npy"), np.load(folder / "documents.npy")
    ends = [*starts.tolist()[1:], len(tokens)]
    return [tokens[start:end].tolist() for start, end in zip(starts.tolist(), ends, strict=True)]


def texts_of(config: CorpusConfig) -> list[str]:
    return [text for _, text in read_documents(config)]


# --- shards ---


def test_every_document_is_its_tokens_and_the_end_of_text(tokenizer, tmp_path):
    texts = some_texts(300)
    config = CorpusConfig(source=str(write(tmp_path / "a.jsonl", texts)), pretrain_share=1)
    folder = build_shards(config, "pretrain", tokenizer, tmp_path / "shards")
    mine = [text for i, text in enumerate(texts) if part_of(f"a.jsonl#{i}", 1) == "pretrain"]
    assert 290 < len(mine) < 300
    assert stored_documents(folder) == [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in mine]
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["documents"], meta["tokens"]) == (len(mine), len(np.load(folder / "tokens.npy")))
    assert np.load(folder / "tokens.npy").dtype == np.uint32
    assert np.load(folder / "documents.npy").dtype == np.uint64


def test_a_tokenizer_that_begins_texts_begins_every_document(tokenizer, tmp_path):
    backend = AutoTokenizer.from_pretrained(saved(tokenizer, tmp_path / "tokenizer")).backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", 1)])
    begins = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|pad|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    config = CorpusConfig(source=str(write(tmp_path / "a.jsonl", some_texts(5))), pretrain_share=1)
    folder = build_shards(config, "pretrain", begins, tmp_path / "shards")
    assert stored_documents(folder) == [[*begins.encode(text), 0] for text in some_texts(5)]
    assert all(document[0] == 1 for document in stored_documents(folder))


def saved(tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


def test_parts_are_disjoint_and_cover_every_document_in_order(tokenizer, tmp_path):
    texts = some_texts(500)
    config = CorpusConfig(source=str(write(tmp_path / "a.jsonl", texts)), pretrain_share=0.3)
    parts = {
        part: [
            tokenizer.decode(ids[:-1])
            for ids in stored_documents(build_shards(config, part, tokenizer, tmp_path / "shards"))
        ]
        for part in PARTS
    }
    assert sorted(text for part in parts.values() for text in part) == sorted(texts)
    for part in parts.values():
        numbers = [int(text.split()[1]) for text in part]
        assert numbers == sorted(numbers)
    assert len(parts["pretrain"]) == pytest.approx(150, abs=40)
    assert 1 <= len(parts["heldout"]) <= 20


def test_a_part_grows_with_its_share():
    """Stage 2 with a larger share reads what it read before, and more; held-out text stays held out."""
    for name in (f"book#{i}" for i in range(500)):
        parts = [part_of(name, share) for share in (0.001, 0.1, 0.5, 0.9, 0.99, 1)]
        if "heldout" in parts:
            assert set(parts) == {"heldout"}
        else:
            assert parts == sorted(parts)  # base, then pretrain
            assert parts[-1] == "pretrain"


def test_shares_of_many_names_are_as_asked():
    parts = [part_of(f"book#{i}", 0.2) for i in range(20_000)]
    assert parts.count("pretrain") / 20_000 == pytest.approx(0.2, abs=0.01)
    assert parts.count("heldout") / 20_000 == pytest.approx(0.01, abs=0.003)


def test_a_part_without_documents_is_an_error(tokenizer, tmp_path):
    config = CorpusConfig(source=str(write(tmp_path / "a.jsonl", ["only one"])), pretrain_share=1)
    with pytest.raises(DataError, match="base part"):
        build_shards(config, "base", tokenizer, tmp_path / "shards")
    assert not list(tmp_path.glob("shards/*/meta.json"))


# --- formats ---


def test_text_jsonl_and_parquet_give_the_same_tokens(tokenizer, tmp_path):
    # Long enough that the text file is cut where the documents meet.
    texts = [f"number {i}\nsoup " + "the room was warm . " * 850 for i in range(3)]
    tokens = {}
    for suffix in (".txt", ".jsonl", ".parquet"):
        config = CorpusConfig(source=str(write(tmp_path / f"a{suffix}", texts)), pretrain_share=1)
        assert texts_of(config) == texts
        folder = build_shards(config, "pretrain", tokenizer, tmp_path / "shards")
        tokens[suffix] = np.load(folder / "tokens.npy").tolist()
    assert tokens[".txt"] == tokens[".jsonl"] == tokens[".parquet"]


@given(st.lists(st.text("ab \n", max_size=40), max_size=30))
def test_cutting_a_text_file_loses_and_adds_nothing(paragraphs):
    text = "\n\n".join(paragraphs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PIECE_CHARACTERS", 30)
        pieces = list(corpus._pieces(text))
    assert "\n\n".join(pieces) == text
    longest = max((len(p) for p in text.split("\n\n")), default=0)
    assert all(len(piece) <= 30 + longest for piece in pieces)


def test_files_of_a_folder_are_read_in_the_order_of_their_names(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "c.txt", ["third"])
    write(tmp_path / "b.jsonl", ["second", "  ", "still second"])
    write(tmp_path / "a.parquet", ["first"])
    write(tmp_path / "z.csv", ["not a corpus"])
    config = CorpusConfig(source=str(tmp_path))
    names = [name for name, _ in read_documents(config)]
    assert texts_of(config) == ["first", "second", "still second", "third"]
    assert names == ["a.parquet#0", "b.jsonl#0", "b.jsonl#2", "c.txt#0"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_reading_stops_after_the_wanted_number_of_documents(tmp_path, name):
    path = write(tmp_path / name, ["", *some_texts(9)])
    assert texts_of(CorpusConfig(source=str(path), max_documents=4)) == some_texts(4)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_rows_without_text_are_passed_over(tmp_path, name):
    path = write(tmp_path / name, ["first", None, "", "last"])
    assert texts_of(CorpusConfig(source=str(path))) == ["first", "last"]


def test_bytes_that_are_not_utf8_do_not_stop_a_run(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 soup")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "caf\xe9 soup"}\n')
    assert texts_of(CorpusConfig(source=str(tmp_path))) == ["caf� soup", "caf� soup"]


# --- the cache ---


def test_shards_are_made_once_and_again_when_something_changes(tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", some_texts(40))
    config = CorpusConfig(source=str(path), pretrain_share=0.5)
    first = build_shards(config, "pretrain", tokenizer, tmp_path / "shards")
    content = (first / "tokens.npy").read_bytes()

    def unread(*_):
        raise AssertionError("the corpus was read again")

    with monkeypatch.context() as patch:
        patch.setattr(corpus, "read_documents", unread)
        assert build_shards(config, "pretrain", tokenizer, tmp_path / "shards") == first
    other_share = CorpusConfig(source=str(path), pretrain_share=0.6)
    assert build_shards(other_share, "pretrain", tokenizer, tmp_path / "shards") != first
    more_tokens = AutoTokenizer.from_pretrained(saved(tokenizer, tmp_path / "tokenizer"))
    more_tokens.add_tokens(["soup"])
    assert build_shards(config, "pretrain", more_tokens, tmp_path / "shards") != first
    write(path, [*some_texts(40)[:-1], "changed"])
    assert build_shards(config, "pretrain", tokenizer, tmp_path / "shards") != first
    assert (first / "tokens.npy").read_bytes() == content


def test_shards_whose_writing_was_cut_are_made_again(tokenizer, tmp_path):
    config = CorpusConfig(source=str(write(tmp_path / "a.jsonl", some_texts(40))), pretrain_share=1)
    folder = build_shards(config, "pretrain", tokenizer, tmp_path / "shards")
    whole = np.load(folder / "tokens.npy")
    (folder / "meta.json").unlink()
    (folder / "tokens.npy").write_bytes((folder / "tokens.npy").read_bytes()[:200])
    assert build_shards(config, "pretrain", tokenizer, tmp_path / "shards") == folder
    assert np.array_equal(np.load(folder / "tokens.npy"), whole)


def test_nothing_is_left_at_the_shards_place_when_writing_is_cut(tokenizer, tmp_path, monkeypatch):
    config = CorpusConfig(source=str(write(tmp_path / "a.jsonl", some_texts(200))), pretrain_share=1)

    def cut(config):
        for count, document in enumerate(read_documents(config)):
            if count == 150:
                raise KeyboardInterrupt
            yield document

    with monkeypatch.context() as patch:
        patch.setattr(corpus, "read_documents", cut)
        with pytest.raises(KeyboardInterrupt):
            build_shards(config, "pretrain", tokenizer, tmp_path / "shards")
    assert {path.suffix for path in (tmp_path / "shards").iterdir()} == {".partial", ".lock"}
    folder = build_shards(config, "pretrain", tokenizer, tmp_path / "shards")
    assert [path for path in (tmp_path / "shards").iterdir() if path.suffix != ".lock"] == [folder]
    fresh = build_shards(config, "pretrain", tokenizer, tmp_path / "fresh")
    assert stored_documents(folder) == stored_documents(fresh)


def test_a_corpus_larger_than_memory_would_fit(tmp_path, monkeypatch):
    """40 MB of tokens are written with a tenth of that in memory at most."""

    class FiveThousandTokens:
        eos_token_id, bos_token_id = 0, None

        def __call__(self, texts, **_):
            return {"input_ids": [[7] * 5000 for _ in texts]}

        def get_vocab(self):
            return {}

    config = CorpusConfig(source=str(write(tmp_path / "a.txt", ["never read"])), pretrain_share=1)
    monkeypatch.setattr(corpus, "read_documents", lambda config: ((f"d#{i}", "x") for i in range(2000)))
    tracemalloc.start()
    folder = build_shards(config, "pretrain", FiveThousandTokens(), tmp_path / "shards")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    assert tokens.nbytes > 35e6
    assert peak < 4e6
    assert tokens[4998:5003].tolist() == [7, 7, 0, 7, 7]


@given(st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=5), max_size=12))
def test_a_growing_array_is_what_numpy_would_have_saved(runs):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "grown.npy"
        with GrowingArray(path, np.uint32) as grown:
            for run in runs:
                grown.append(np.asarray(run, dtype=np.uint32))
        expected = io.BytesIO()
        np.save(expected, np.asarray([x for run in runs for x in run], dtype=np.uint32))
        assert path.read_bytes() == expected.getvalue()


def test_a_step_reads_its_corpus_once_for_its_digest(cli, project, llama, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(corpus, "file_digest", lambda *paths: read.append(paths) or file_digest(*paths))
    outcome = cli(
        "pretrain", project, "--source", llama, "--output", tmp_path / "new",
        "--set", f"output_dir={tmp_path}", "--set", "pretrain.tokens=64",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert len(read) == 1


# --- sequences ---


@pytest.mark.parametrize("length", [8, 50, 64])
def test_sequences_are_consecutive_runs_of_the_shard(tokenizer, tmp_path, length):
    config = CorpusConfig(source=str(write(tmp_path / "a.jsonl", some_texts(60))), pretrain_share=1)
    folder = build_shards(config, "pretrain", tokenizer, tmp_path / "shards")
    tokens = np.load(folder / "tokens.npy").tolist()
    sequences = PackedSequences(folder, length)
    rows = [sequences[i]["input_ids"].tolist() for i in range(len(sequences))]
    assert [token for row in rows for token in row] == tokens[: len(tokens) // length * length]
    batch = collate_packed([sequences[0], sequences[2]])
    assert batch["input_ids"].tolist() == [rows[0], rows[2]]
    assert batch["labels"].tolist() == [rows[0], rows[2]]
