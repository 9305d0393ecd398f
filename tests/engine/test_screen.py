"""Screened greedy decoding finds the very tokens that the whole head does, ties and near ties included."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_student import core_model

from bitdistill import Engine, _core
from bitdistill.errors import EngineError
from bitdistill.export import export

PROMPTS = [np.random.default_rng(seed).integers(0, 300, 12).astype(np.int32) for seed in range(8)]


def greedy(model: _core.Model, prompt: np.ndarray) -> tuple[list[int], float]:
    session = _core.Session(model)
    session.forward(prompt)
    tokens, _ = session.decode(_core.Sampler(), 40)
    return tokens, session.rescored_rows


def with_hard_rows(model: Any, table: str) -> Any:
    """Rows in twos: twins to the bit, and neighbours that differ by one unit in the last place of one weight."""
    with torch.no_grad():
        weight = model.lm_head.weight
        weight[1::4] = weight[0::4]
        weight[3::4] = weight[2::4]
        if table == "BF16":
            weight.copy_(weight.bfloat16().float())
        weight[3::4, 5] *= 1 + (2**-7 if table == "BF16" else 2**-22)
    return model


@pytest.mark.parametrize("table", ["F32", "BF16"])
@pytest.mark.parametrize("threads", [1, 3])
def test_tokens_are_those_of_the_whole_head(
    make_student: Callable[..., Any], tmp_path: Path, isa: str, table: str, threads: int
) -> None:
    model = with_hard_rows(
        make_student("qwen3", max_position_embeddings=128, tie_word_embeddings=False), table
    )
    options = {"table": table, "isa": isa, "threads": threads}
    whole, screened = (core_model(model, tmp_path, screened=s, **options) for s in (False, True))
    assert screened.memory()["screen"] >= 300 * 32 > whole.memory()["screen"] == 0
    rescored = []
    for prompt in PROMPTS:
        expected, none = greedy(whole, prompt)
        found, rows = greedy(screened, prompt)
        assert found == expected
        assert none == 0
        rescored.append(rows)
    assert 1 <= np.mean(rescored) < 100  # of 300: the bound rules most rows out


def test_the_first_of_equal_rows_wins(make_student: Callable[..., Any], tmp_path: Path, isa: str) -> None:
    model = make_student("qwen3", max_position_embeddings=128, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[:] = model.lm_head.weight[0]
    screened = core_model(model, tmp_path, table="BF16", isa=isa, threads=2, screened=True)
    tokens, rescored = greedy(screened, PROMPTS[0])
    assert set(tokens) == {0}
    assert rescored == 300  # none can be ruled out


def test_text_goes_on_after_a_stop_and_with_other_samplers(
    make_student: Callable[..., Any], tmp_path: Path
) -> None:
    """A stop token leaves whole logits behind; a sampler with a temperature never sees the screen."""
    student = make_student("qwen3", max_position_embeddings=128)
    texts = []
    for screened in (False, True):
        session = _core.Session(core_model(student, tmp_path, table="BF16", screened=screened))
        session.forward(PROMPTS[0])
        first, _ = session.decode(_core.Sampler(), 10)
        again = _core.Session(core_model(student, tmp_path, table="BF16", screened=screened))
        again.forward(PROMPTS[0])
        stopped = again.decode(_core.Sampler(), 10, stop=[first[-1]])
        rest = again.decode(_core.Sampler(temperature=1.0, seed=5), 20)
        texts.append((first, stopped, rest, again.position))
    assert texts[0] == texts[1]
    assert texts[0][1][1] == "stop"


def test_a_head_with_an_infinite_weight(make_student: Callable[..., Any], tmp_path: Path) -> None:
    model = make_student("qwen3", max_position_embeddings=128, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[7, 3] = float("inf")
    whole, screened = (core_model(model, tmp_path, screened=s) for s in (False, True))
    assert greedy(screened, PROMPTS[1])[0] == greedy(whole, PROMPTS[1])[0]


def test_the_engine_screens_full_precision_heads_alone(
    save_student: Callable[..., Path], tmp_path: Path
) -> None:
    source = save_student(tmp_path / "student", "qwen3", {}, max_position_embeddings=128)
    export(source, tmp_path / "bf16", head="bf16")
    export(source, tmp_path / "int8", head="int8")
    expected = Engine(tmp_path / "bf16").generate("a", max_new_tokens=20)
    engine = Engine(tmp_path / "bf16", screening=True)
    assert engine.generate("a", max_new_tokens=20).tokens == expected.tokens
    assert engine.generate_batch(["a", "b"], max_new_tokens=20)[0].tokens == expected.tokens
    with pytest.raises(EngineError, match="export with a head in bf16"):
        Engine(tmp_path / "int8", screening=True)
