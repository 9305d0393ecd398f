"""Which tokens of a BPE vocabulary some data need, and the tokenizer that has no others.

Kept are the tokens that occur in the data, all added tokens, symbols that spell whatever else may come (``spelling``),
and the merge closure: of every kept token the symbols that BPE makes on the way from its characters to it. Of the
merges those stay, in their order, whose two parts and result are kept.

**A text whose tokens were all kept keeps its tokens.** BPE starts at the characters of a word and applies, again and
again, the applicable merge of lowest rank, the leftmost of equals, until none applies.

1. Symbols only ever join, so each symbol on the way of a word lies inside one of the word's final tokens. Inside that
   token's span the steps are those of the token spelled alone: no step crosses the span's ends, and the lowest merge of
   the whole word is the lowest of the span that it falls into. So all symbols on the way of the word are in the closure
   of its tokens.
2. By induction over the steps: both vocabularies stand at the same symbols, all kept. The merge that the full one
   applies has kept parts and a kept result, so the trimmed one has it; the trimmed one's merges are some of the full
   one's in the same order, so none lower applies. Both take the same step, and where none is left to the full one, none
   is to the other.

What happens before BPE (normalising, splitting at added tokens and into words) knows no vocabulary but the added
tokens, which all stay. With ``ignore_merges`` a word that is a token is taken whole: a kept one still is, and one that
was none has not become one. A character that had no token, and was spelled in bytes or as the unknown token, still has
none.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tokenizers import pre_tokenizers

from ..errors import CheckpointError

Document = dict[str, Any]
"""What a JSON file of a tokenizer or a model holds."""

SPACE = "\u2581"
"""How SentencePiece writes a space."""


class BpeVocabulary:
    """The vocabulary and merges of a ``tokenizer.json``."""

    def __init__(self, document: Document, where: str) -> None:
        """``where`` names the tokenizer in errors.

        Raises:
            CheckpointError: its model is not BPE, or BPE with a setting under which the argument above does not hold.
        """
        model = document.get("model") or {}
        if model.get("type") != "BPE":
            raise CheckpointError(
                f"{where}: its tokenizer is a {model.get('type')} model, and trim takes BPE, which all decoders here "
                "have; leave the vocabulary as it is"
            )
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key):
                raise CheckpointError(
                    f"{where}: {key} = {model[key]!r} in tokenizer.json: trim takes BPE without it; leave the "
                    "vocabulary as it is"
                )
        self.document = document
        self.ids: dict[str, int] = model["vocab"]
        self.merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self.added: dict[str, int] = {t["content"]: t["id"] for t in document.get("added_tokens") or []}
        self.tokens = {i: t for t, i in (self.ids | self.added).items()}

    def derivation(self, token: str) -> set[str]:
        """The symbols that BPE makes of a token's characters on the way to it, both ends included.

        The token alone where merges do not lead to it (an added token, a byte, a word of ``ignore_merges``).
        """
        symbols = list(token)
        made = {*symbols, token}
        while len(symbols) > 1:
            pairs = enumerate(itertools.pairwise(symbols))
            ranked = [(self.ranks[pair], place) for place, pair in pairs if pair in self.ranks]
            if not ranked:
                return {token}
            _, place = min(ranked)
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
            made.add(symbols[place])
        return made

    def closure(self, ids: Iterable[int]) -> set[int]:
        """``ids`` and the symbols on the way to them."""
        found = set(ids)
        for token in [self.tokens[i] for i in found if i in self.tokens]:
            found |= {self.ids[symbol] for symbol in self.derivation(token) if symbol in self.ids}
        return found

    def fixed(self) -> set[int]:
        """What stays whatever the data: added tokens, the unknown token, what is put around a text, ``spelling``."""
        found = set(self.added.values()) | {self.ids[symbol] for symbol in self.spelling()}
        unknown = self.document["model"].get("unk_token")
        if unknown in self.ids:
            found.add(self.ids[unknown])
        return found | set(_ids_around(self.document))

    def spelling(self) -> set[str]:
        """Symbols that spell any text, as far as the full vocabulary can.

        Byte-level BPE: its alphabet of 256. Byte fallback: ``<0x00>`` to ``<0xFF>``, and besides ASCII and the space,
        so that a rare word comes in letters and not in bytes. Neither: every character, as one without a token is lost.
        """
        characters = {token for token in self.ids if len(token) == 1}
        if _has_type("ByteLevel", self.document.get("pre_tokenizer"), self.document.get("decoder")):
            return characters & set(pre_tokenizers.ByteLevel.alphabet())
        if self.document["model"].get("byte_fallback"):
            in_bytes = {f"<0x{byte:02X}>" for byte in range(256)} & self.ids.keys()
            return in_bytes | {c for c in characters if c.isascii() or c == SPACE}
        return characters

    def filled(self, kept: set[int], size: int, rows: int, frequent: Iterable[int] = ()) -> set[int]:
        """``kept`` and further tokens up to ``size``, each with the symbols on the way to it.

        First ``frequent`` in its order, then what the lowest merges make, then the lowest ids. Ids of ``rows`` and
        above are left out.
        """
        kept = set(kept)
        by_count = (self.tokens[i] for i in frequent if i in self.tokens)
        by_rank = (left + right for left, right in self.merges)
        by_rank = (
            token for token in by_rank if len(self.derivation(token)) > 1
        )  # else a lower merge prevents it
        by_id = sorted(self.ids, key=self.ids.__getitem__)
        for token in itertools.chain(by_count, by_rank, by_id):
            if len(kept) >= size:
                break
            if token not in self.ids or self.ids[token] in kept:
                continue
            more = {self.ids[symbol] for symbol in self.derivation(token) if symbol in self.ids} - kept
            if len(kept) + len(more) <= size and max(more) < rows:
                kept |= more
        return kept

    def ordered(self, kept: set[int]) -> list[int]:
        """Old ids in the order of the new ones: the model's tokens, added ones, rows without a token.

        The order within each is the old one. The tokenizers library numbers added tokens behind the model's.
        """
        in_model = set(self.ids.values())
        return sorted(kept, key=lambda i: (0 if i in in_model else 1 if i in self.tokens else 2, i))

    def trimmed(self, new_ids: Mapping[int, int]) -> Document:
        """The ``tokenizer.json`` with the tokens of ``new_ids`` (old id -> new id) alone."""
        model = self.document["model"]
        vocab = {t: new_ids[i] for t, i in self.ids.items() if i in new_ids}
        merges = [
            merge
            for merge, (left, right) in zip(model["merges"], self.merges, strict=True)
            if left in vocab and right in vocab and left + right in vocab
        ]
        added = [
            entry | {"id": new_ids[entry["id"]]}
            for entry in self.document.get("added_tokens") or []
            if entry["id"] in new_ids
        ]
        document = self.document | {
            "added_tokens": sorted(added, key=lambda entry: entry["id"]),
            "model": model
            | {"vocab": dict(sorted(vocab.items(), key=lambda item: item[1])), "merges": merges},
        }
        if document.get("post_processor"):
            document["post_processor"] = _renumbered_processor(document["post_processor"], new_ids)
        if document.get("padding"):
            document["padding"] = document["padding"] | {"pad_id": new_ids[document["padding"]["pad_id"]]}
        return document


def _has_type(name: str, *parts: Document | None) -> bool:
    """Whether a part of a tokenizer is of a type, or a sequence with one."""
    for part in filter(None, parts):
        inner = [*part.get("pretokenizers", ()), *part.get("decoders", ())]
        if part.get("type") == name or _has_type(name, *inner):
            return True
    return False


def _processors(processor: Document | None) -> Iterator[Document]:
    """A post-processor, or those that it is a sequence of."""
    if processor is None:
        return
    if processor.get("type") == "Sequence":
        for part in processor["processors"]:
            yield from _processors(part)
    else:
        yield processor


def _ids_around(document: Document) -> Iterator[int]:
    """Ids that the post-processor puts around a text, and the one that pads it."""
    for processor in _processors(document.get("post_processor")):
        yield from (processor[key][1] for key in ("sep", "cls") if key in processor)
        if processor.get("type") == "TemplateProcessing":
            yield from (i for special in processor["special_tokens"].values() for i in special["ids"])
    if document.get("padding"):
        yield document["padding"]["pad_id"]


def _renumbered_processor(processor: Document, new_ids: Mapping[int, int]) -> Document:
    if processor.get("type") == "Sequence":
        parts = [_renumbered_processor(part, new_ids) for part in processor["processors"]]
        return processor | {"processors": parts}
    changed: Document = {
        key: [processor[key][0], new_ids[processor[key][1]]] for key in ("sep", "cls") if key in processor
    }
    if processor.get("type") == "TemplateProcessing":
        changed["special_tokens"] = {
            name: special | {"ids": [new_ids[i] for i in special["ids"]]}
            for name, special in processor["special_tokens"].items()
        }
    return processor | changed


# --- ids in the files of a model ---

_SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")
_UNKNOWN = ("sequence_bias", "force_words_ids", "bad_words_ids", "forced_decoder_ids")


def config_ids(config: Mapping[str, Any]) -> set[int]:
    """Ids that a config's ``*_token_id`` keys name, each an id or a list of them."""
    values = [value for key, value in config.items() if key.endswith("_token_id")]
    listed = [i for value in values for i in (value if isinstance(value, list) else [value])]
    return {i for i in listed if type(i) is int and i >= 0}


def renumbered_config(config: Mapping[str, Any], new_ids: Mapping[int, int], where: str) -> Document:
    """A config with its token ids renumbered; one that no row had stays. Suppressed tokens that are gone are left out.

    Raises:
        CheckpointError: it holds token ids in a form that is not known here.
    """

    def new(value: Any) -> Any:
        if isinstance(value, list):
            return [new(i) for i in value]
        return new_ids.get(value, value) if type(value) is int else value

    found = {key: new(value) if key.endswith("_token_id") else value for key, value in config.items()}
    for key in _UNKNOWN:
        if found.get(key):
            raise CheckpointError(
                f"{where}: {key} holds token ids that trim does not renumber; take it out first"
            )
    for key in _SUPPRESSED:
        if found.get(key):
            found[key] = [new_ids[i] for i in found[key] if i in new_ids]
    if isinstance(found.get("added_tokens_decoder"), dict):
        added = {new_ids[int(i)]: t for i, t in found["added_tokens_decoder"].items() if int(i) in new_ids}
        found["added_tokens_decoder"] = {str(i): added[i] for i in sorted(added)}
    return found
