"""Label logits are a session's to the bit, with one layer's keys and values and the labels' rows of the head."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitdistill import Engine, _core
from bitdistill.errors import EngineError
from bitdistill.export import export

LENGTHS = (40, 1, 300, 7, 144, 120, 1)
"""Of the texts: groups of several, some that fill a chunk, one longer than a chunk."""

LABELS = [7, 299, 40, 7]


def texts() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 300, count).astype(np.int32) for count in LENGTHS]


@pytest.fixture
def pack(
    save_student: Callable[..., Path], tmp_path: Path, isa: str, monkeypatch: Any
) -> Callable[..., Engine]:
    def make(family: str, head: str, **config: Any) -> Engine:
        monkeypatch.setenv("BITDISTILL_ISA", isa)
        source = save_student(tmp_path / "student", family, {}, max_position_embeddings=320, **config)
        export(source, tmp_path / "packed", head=head)
        return Engine(tmp_path / "packed", threads=2)

    return make


@pytest.mark.parametrize("head", ["int4", "int8", "bf16"])
@pytest.mark.parametrize("kv", ["fp16", "int8", "int4", "int3"])
def test_logits_are_those_of_a_session(pack: Callable[..., Engine], head: str, kv: str) -> None:
    engine = pack("qwen3", head)
    labels = _core.LabelHead(engine.core, LABELS, kv=kv)
    expected = [_core.Session(engine.core, kv=kv).forward(text)[LABELS] for text in texts()]
    np.testing.assert_array_equal(labels.logits(texts()), expected)
    np.testing.assert_array_equal(labels.logits(texts()[2:3]), expected[2:3])  # after others left their keys
    assert labels.logits([]).shape == (0, 4)


def test_windows_and_output_norms(pack: Callable[..., Engine]) -> None:
    engine = pack("gemma3_text", "int8")
    expected = [_core.Session(engine.core).forward(text)[LABELS] for text in texts()]
    np.testing.assert_array_equal(_core.LabelHead(engine.core, LABELS).logits(texts()), expected)


def test_one_layer(pack: Callable[..., Engine]) -> None:
    """The first layer is the last."""
    engine = pack("qwen3", "bf16", num_hidden_layers=1)
    expected = [_core.Session(engine.core).forward(text)[LABELS] for text in texts()]
    np.testing.assert_array_equal(_core.LabelHead(engine.core, LABELS).logits(texts()), expected)


def test_classify_takes_the_best_label(pack: Callable[..., Engine]) -> None:
    engine = pack("qwen3", "int8")
    prompts = ["one two", "a film", "bad", "the end of the story"]
    single = [f"{letter}" for letter in "abcd"]
    assert {len(engine.text.encode(label, special=False)) for label in single} == {1}
    for labels in (single, ["ab", "c", "a long label"]):
        best = []
        for prompt in prompts:
            scores = engine.score(prompt, labels)
            best.append(labels[int(np.argmax(scores))])
        assert engine.classify_batch(prompts, labels) == best
        assert engine.classify(prompts[0], labels) == best[0]
    with pytest.raises(EngineError, match="no labels"):
        engine.classify("a", [])


def test_bad_input(pack: Callable[..., Engine]) -> None:
    engine = pack("qwen3", "int8")
    with pytest.raises(ValueError, match="no labels"):
        _core.LabelHead(engine.core, [])
    with pytest.raises(ValueError, match="token 300 is outside the vocabulary of 300"):
        _core.LabelHead(engine.core, [1, 300])
    head = _core.LabelHead(engine.core, LABELS)
    for text, message in (
        ([], "no tokens"),
        ([1, -1], "token -1 is outside"),
        ([1] * 321, "exceed the context of 320"),
    ):
        with pytest.raises(ValueError, match=message):
            head.logits([np.array([1], np.int32), np.array(text, np.int32)])
    with pytest.raises(EngineError, match="outside the vocabulary"):
        engine.label_scores([[1, 2]], [[300], [1]])
