"""Trimmed BPE vocabularies: the tokenizers library itself encodes the same texts to the same tokens as before."""

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from bitdistill.data.vocabulary import BpeVocabulary, config_ids, renumbered_config
from bitdistill.errors import CheckpointError

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def added(content: str, id_: int, **changes: Any) -> dict:
    entry = {"id": id_, "content": content, "single_word": False, "lstrip": False, "rstrip": False}
    return entry | {"normalized": False, "special": True} | changes


def bpe(characters: str, merges: list[tuple[str, str]], **model: Any) -> dict:
    """A tokenizer.json without normalizer and words: one text, one BPE."""
    tokens = dict.fromkeys([*model.pop("before", []), *characters, *(a + b for a, b in merges)])
    vocab = {token: i for i, token in enumerate(tokens)}
    merges_ = list(dict.fromkeys(merges))
    unknown = {"unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": {"type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
        | unknown | {"vocab": vocab, "merges": merges_} | model,
    }  # fmt: skip


def library(document: dict) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(document))


def trim(document: dict, texts: list[str], **options: Any) -> tuple[dict, list[int]]:
    """The document with what the texts need, and old ids by new id."""
    vocabulary = BpeVocabulary(document, "here")
    tokenizer = library(document)
    seen = {i for text in texts for i in tokenizer.encode(text).ids}
    kept = vocabulary.closure(seen | vocabulary.fixed())
    if options:
        kept = vocabulary.filled(kept, rows=10**6, **options)
    old_ids = vocabulary.ordered(kept)
    return vocabulary.trimmed({old: new for new, old in enumerate(old_ids)}), old_ids


def random_merges(rng: random.Random, characters: str, count: int) -> list[tuple[str, str]]:
    """Merges of parts that exist, in any order: several ways to one token, tokens that no way leads to."""
    tokens, merges = list(characters), []
    for _ in range(count):
        pair = rng.choice(tokens), rng.choice(tokens)
        merges.append(pair)
        tokens.append("".join(pair))
    rng.shuffle(merges)
    return merges


@given(
    seed=st.integers(0, 10**6),
    texts=st.lists(st.text("abcz", min_size=1, max_size=14), min_size=1, max_size=4),
    kind=st.sampled_from(["plain", "fallback", "ignore_merges"]),
    extra=st.integers(0, 6),
)
def test_texts_that_were_seen_keep_their_tokens(seed: int, texts: list[str], kind: str, extra: int) -> None:
    rng = random.Random(seed)
    options: dict[str, Any] = {"unk_token": "?", "before": ["?"]}
    if kind == "fallback":
        options = {"byte_fallback": True, "before": BYTES}
    if kind == "ignore_merges":
        options |= {"ignore_merges": True}
    document = bpe("abc", random_merges(rng, "abc", 12), **options)  # z has no token
    before = library(document)
    _, needed = trim(document, texts)
    after_document, old_ids = (
        trim(document, texts, size=len(needed) + extra) if extra else trim(document, texts)
    )
    after = library(after_document)
    for text in texts:
        old, new = before.encode(text), after.encode(text)
        assert new.tokens == old.tokens
        assert [old_ids[i] for i in new.ids] == old.ids
    assert set(needed) <= set(old_ids)


def test_kept_merges_are_those_whose_parts_and_result_are_kept_in_their_order() -> None:
    merges = [
        ("a", "b"),
        ("c", "d"),
        ("ab", "c"),
        ("ab", "cd"),
        ("b", "c"),
        ("a", "bc"),
        ("e", "f"),
        ("ab", "e"),
    ]
    document = bpe("abcdef", merges)
    # abcd = ab + cd, for c + d comes before ab + c; abc by its other ways is not on it, and bc is on no way.
    after, _ = trim(document, ["abcd"])
    assert list(after["model"]["vocab"]) == ["a", "b", "c", "d", "e", "f", "ab", "cd", "abcd"]
    assert [tuple(m) for m in after["model"]["merges"]] == [("a", "b"), ("c", "d"), ("ab", "cd")]


def test_merges_may_be_written_as_texts() -> None:
    document = bpe("abc", [("a", "b"), ("ab", "c"), ("b", "c")])
    document["model"]["merges"] = ["a b", "ab c", "b c"]
    after, _ = trim(document, ["abc"])
    assert after["model"]["merges"] == ["a b", "ab c"]
    assert library(after).encode("abc").tokens == ["abc"]


def test_a_size_fills_with_frequent_tokens_then_with_the_lowest_merges() -> None:
    merges = [
        ("a", "b"),
        ("b", "c"),
        ("c", "d"),
        ("cd", "e"),
        ("ab", "cde"),
        ("d", "e"),
        ("x", "y"),
        ("xy", "z"),
    ]
    document = bpe("abcdexyz", merges)
    characters = list("abcdexyz")
    tokens = lambda **options: list(trim(document, ["a"], **options)[0]["model"]["vocab"])  # noqa: E731
    assert tokens(size=8) == characters
    assert tokens(size=10) == [*characters, "ab", "bc"]
    vocab = document["model"]["vocab"]
    frequent = [vocab["xyz"], vocab["de"]]
    assert tokens(size=10, frequent=frequent) == [*characters, "xy", "xyz"]  # with what leads to it
    assert tokens(size=12, frequent=frequent) == [*characters, "ab", "de", "xy", "xyz"]
    # One row is left and xyz needs two: what fits comes instead.
    assert tokens(size=9, frequent=frequent) == [*characters, "de"]


def test_a_token_that_no_way_leads_to_fills_last() -> None:
    # bc comes first, so abc is a + bc, and ab + c never happens: abcab is on no way.
    merges = [("b", "c"), ("abc", "ab"), ("a", "bc"), ("a", "b"), ("ab", "c")]
    document = bpe("abc", [*merges, ("c", "a"), ("ca", "b")])
    vocabulary = BpeVocabulary(document, "here")
    reachable = [t for t in vocabulary.ids if library(document).encode(t).tokens == [t]]
    after, _ = trim(document, ["a"], size=len(reachable))
    assert sorted(after["model"]["vocab"]) == sorted(reachable)
    assert len(reachable) < len(vocabulary.ids)


@pytest.fixture
def byte_level(tokenizer: Any) -> dict:
    return dict(json.loads(tokenizer.backend_tokenizer.to_str()))


def test_byte_level_bpe_still_spells_every_text(byte_level: dict) -> None:
    after, old_ids = trim(byte_level, ["the soup was good ."])
    assert len(old_ids) < len(byte_level["model"]["vocab"])
    tokenizer = library(after)
    for text in ("the view seemed bad .", "Größe 漢字 🙂\n\t\x00", "zzz"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_byte_fallback_keeps_bytes_and_ascii() -> None:
    merges = [("▁", "a"), ("é", "a"), ("q", "r")]
    document = bpe("▁aéqr", merges, byte_fallback=True, before=BYTES)
    after, _ = trim(document, ["▁a"])
    assert set(after["model"]["vocab"]) == {*BYTES, "▁", "a", "q", "r", "▁a"}
    assert library(after).encode("éq").tokens == ["<0xC3>", "<0xA9>", "q"]


def test_without_a_fallback_every_character_stays() -> None:
    after, _ = trim(bpe("aéq", [("a", "q")]), ["a"])
    assert list(after["model"]["vocab"]) == ["a", "é", "q"]


def test_ids_with_holes_and_rows_without_tokens_come_together_in_the_librarys_order() -> None:
    document = bpe("abc", [("a", "b"), ("b", "c")])
    document["model"]["vocab"] = {"a": 3, "b": 8, "c": 90, "ab": 10, "bc": 40}
    tokenizer = library(document)
    tokenizer.add_special_tokens(["<end>"])
    document = json.loads(tokenizer.to_str())
    vocabulary = BpeVocabulary(document, "here")
    end = vocabulary.added["<end>"]
    old_ids = vocabulary.ordered({3, 8, 90, 10, end, 7})  # 7 is no token's, named by a config
    assert old_ids == [3, 8, 10, 90, end, 7]
    assert end < 8  # the library counts the vocabulary, holes left out
    after = library(vocabulary.trimmed({old: new for new, old in enumerate(old_ids)}))
    assert after.get_vocab() == {"a": 0, "b": 1, "ab": 2, "c": 3, "<end>": 4}
    assert after.encode("abc<end>").ids == [2, 3, 4]


def template(token: str, id_: int) -> dict:
    pieces = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {token: {"id": token, "ids": [id_], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": special}


def framed(token_1: tuple[str, int], token_2: tuple[str, int]) -> dict:
    return {"type": "BertProcessing", "cls": list(token_1), "sep": list(token_2)}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


@pytest.mark.parametrize("kind", ["template", "frame", "sequence"])
def test_what_is_put_around_a_text_keeps_its_tokens(kind: str) -> None:
    document = bpe("abcd", [("a", "b"), ("c", "d")], before=["<s>", "</s>"])
    processors = {
        "template": template("<s>", 0),
        "frame": framed(("<s>", 0), ("</s>", 1)),
        "sequence": {"type": "Sequence", "processors": [BYTE_LEVEL, template("</s>", 1)]},
    }
    # Characters leave their ids, so that the special tokens get others.
    document["model"]["vocab"] = {t: 20 - i for i, t in enumerate(document["model"]["vocab"])}
    renumber = {0: 20, 1: 19}
    text = json.dumps(processors[kind])
    document["post_processor"] = json.loads(text)
    for special in ("<s>", "</s>"):
        document["added_tokens"].append(added(special, document["model"]["vocab"][special]))
    processor = document["post_processor"]
    for part in processor.get("processors", [processor]):
        for key in ("cls", "sep"):
            if key in part:
                part[key][1] = renumber[part[key][1]]
        for special in part.get("special_tokens", {}).values():
            special["ids"] = [renumber[i] for i in special["ids"]]
    document["padding"] = {
        "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 19, "pad_type_id": 0,
        "pad_token": "</s>",
    }  # fmt: skip
    after_document, old_ids = trim(document, ["ab"])
    before, after = library(document), library(after_document)
    pairs = zip(before.encode_batch(["ab", "a"]), after.encode_batch(["ab", "a"]), strict=True)
    for old, new in pairs:
        assert new.tokens == old.tokens
        assert [old_ids[i] for i in new.ids] == old.ids
        assert len(new.ids) > 1


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (json.loads(Tokenizer(models.Unigram([("a", 0.0)], 0, False)).to_str()), "is a Unigram model"),
        (json.loads(Tokenizer(models.WordPiece({"[UNK]": 0})).to_str()), "is a WordPiece model"),
        (bpe("ab", [("a", "b")], dropout=0.1), "dropout = 0.1"),
        (bpe("ab", [], end_of_word_suffix="</w>"), "end_of_word_suffix = '</w>'"),
        (bpe("ab", [], continuing_subword_prefix="##"), "continuing_subword_prefix = '##'"),
    ],
)
def test_models_under_which_tokens_could_change_are_refused(document: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"here: .*{message}"):
        BpeVocabulary(document, "here")


def test_ids_of_a_config_are_renumbered() -> None:
    config = {
        "bos_token_id": None, "eos_token_id": [7, 9], "pad_token_id": -1, "vocab_size": 9, "image_token_id": 900,
        "decoder_start_token_id": 7, "suppress_tokens": [7, 8], "forced_decoder_ids": None,
        "added_tokens_decoder": {"9": {"content": "</s>"}, "7": {"content": "<s>"}, "8": {"content": "x"}},
    }  # fmt: skip
    assert config_ids(config) == {7, 9, 900}
    assert renumbered_config(config, {7: 0, 9: 1}, "here") == config | {
        "eos_token_id": [0, 1], "decoder_start_token_id": 0, "suppress_tokens": [0],
        "added_tokens_decoder": {"0": {"content": "<s>"}, "1": {"content": "</s>"}},
    }  # fmt: skip
    with pytest.raises(CheckpointError, match=r"here: sequence_bias holds token ids"):
        renumbered_config({"sequence_bias": [[[7], 2.0]]}, {7: 0}, "here")
