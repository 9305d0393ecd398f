"""Several sequences together give what each gives alone, to the last bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitdistill import Engine, _core
from bitdistill.errors import EngineError
from bitdistill.export import export

LENGTHS = (1, 40, 300, 7, 20)
"""Of the prompts: 368 tokens, so chunks of 264 end inside one."""


def tokens(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 300, count).astype(np.int32)


def prompts() -> list[np.ndarray]:
    return [tokens(count, seed) for seed, count in enumerate(LENGTHS)]


@pytest.fixture(params=["qwen3", "gemma3_text"])
def engine(
    request: pytest.FixtureRequest,
    save_student: Callable[..., Path],
    tmp_path: Path,
    isa: str,
    monkeypatch: Any,
) -> Engine:
    """One with grouped queries, one with sliding windows; in every room."""
    monkeypatch.setenv("BITDISTILL_ISA", isa)
    source = save_student(tmp_path / "student", request.param, {}, max_position_embeddings=320)
    export(source, tmp_path / "packed", head="int8")
    return Engine(tmp_path / "packed", threads=2)


@pytest.mark.parametrize("kv", ["fp16", "int8", "int4", "int3", "fp32"])
def test_prompts_and_texts_are_those_of_each_alone(engine: Engine, kv: str) -> None:
    alone = [_core.Session(engine.core, kv=kv) for _ in LENGTHS]
    together = [_core.Session(engine.core, kv=kv) for _ in LENGTHS]
    expected = np.stack([session.forward(prompt) for session, prompt in zip(alone, prompts(), strict=True)])
    np.testing.assert_array_equal(_core.forward_together(together, prompts()), expected)

    def samplers() -> list[_core.Sampler]:
        return [_core.Sampler(temperature=t, seed=3) for t in (0.0, 0.0, 1.0, 0.7, 0.0)]

    each = [session.decode(sampler, 30) for session, sampler in zip(alone, samplers(), strict=True)]
    assert _core.decode_together(together, samplers(), 30) == each
    assert {reason for _, reason in each} == {
        "length",
        "context",
    }  # the prompt of 300 reaches the limit of 320
    assert [session.position for session in together] == [session.position for session in alone]
    del alone[2], together[2]
    more = [tokens(5, seed=90 + i) for i in range(4)]
    expected = np.stack([session.forward(part) for session, part in zip(alone, more, strict=True)])
    np.testing.assert_array_equal(_core.forward_together(together, more), expected)


def test_a_sequence_that_stops_leaves_the_others_their_text(engine: Engine) -> None:
    def started() -> list[_core.Session]:
        sessions = [engine.session() for _ in range(3)]
        for seed, session in enumerate(sessions):
            session.forward(tokens(9, seed))
        return sessions

    free = _core.decode_together(started(), [_core.Sampler(temperature=1, seed=s) for s in range(3)], 12)
    stop = free[1][0][4]
    found = _core.decode_together(
        started(), [_core.Sampler(temperature=1, seed=s) for s in range(3)], 12, [stop]
    )
    for (whole, _), (text, reason) in zip(free, found, strict=True):
        cut = whole.index(stop) if stop in whole else len(whole)
        assert (text, reason) == (whole[:cut], "stop" if stop in whole else "length")


def test_what_cannot_go_together_is_refused_and_nothing_changes(
    engine: Engine, save_student: Callable[..., Path], tmp_path: Path
) -> None:
    one, two = engine.session(), engine.session()
    other = Engine(tmp_path / "packed").session()
    greedy = _core.Sampler()
    for sessions, parts, message in (
        ([one, one], [tokens(2, 0)] * 2, "twice"),
        ([one, other], [tokens(2, 0)] * 2, "different models"),
        ([one, two], [tokens(2, 0)], "for each session"),
        ([one, two], [tokens(2, 0), tokens(2, 0) + 1000], "outside the vocabulary"),
        ([one, two], [tokens(2, 0), tokens(0, 0)], "no tokens"),
        ([one, two], [tokens(2, 0), tokens(400, 0)], "exceed the context"),
        ([], [], "no sessions"),
    ):
        with pytest.raises(ValueError, match=message):
            _core.forward_together(sessions, parts)
        assert (one.position, two.position) == (0, 0)
    with pytest.raises(ValueError, match="nothing to continue"):
        _core.decode_together([one, two], [greedy, _core.Sampler()], 3)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_k": 40, "seed": 5}])
def test_generate_batch_is_generate_for_each(engine: Engine, options: dict[str, Any]) -> None:
    prompts = ["the soup was", "a very cold room and a", [5, 6, 7, 8], "the host"]
    alone = [engine.generate(prompt, max_new_tokens=24, **options) for prompt in prompts]
    stops = [alone[1].text[3:6], alone[3].text[-4:]]  # one ends a text early, one perhaps at its end
    assert all(stops)
    for stop in ((), stops):
        alone = [engine.generate(prompt, max_new_tokens=24, stop=stop, **options) for prompt in prompts]
        together = engine.generate_batch(prompts, max_new_tokens=24, stop=stop, **options)
        assert [(g.text, g.finish_reason, g.prompt_tokens) for g in together] == [
            (g.text, g.finish_reason, g.prompt_tokens) for g in alone
        ]
        for ours, theirs in zip(together, alone, strict=True):
            # A stop text may be seen a few tokens later than it was written.
            assert ours.tokens[: len(theirs.tokens)] == theirs.tokens
    assert engine.generate_batch([]) == []


def test_a_batch_refuses_what_generate_refuses(engine: Engine) -> None:
    for options, message in (
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"temperature": -1}, "temperature"),
        ({"stop": [""]}, "must not be empty"),
    ):
        with pytest.raises(EngineError, match=message):
            engine.generate_batch(["the soup"], **options)
    with pytest.raises(EngineError, match="the prompt is empty"):
        engine.generate_batch(["the soup", []])
    with pytest.raises(EngineError, match="leaves no room"):
        engine.generate_batch(["the soup", list(tokens(320, 0))])
    with pytest.raises(TypeError, match="'max_tokens' is no option"):
        engine.generate_batch(["the soup"], max_tokens=3)
