"""A session: its position, its cache, generation and scoring, whatever the chunks and the threads."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed_student import core_model
from scipy.special import log_softmax

from bitdistill import _core


@pytest.fixture
def engine(make_student: Callable[..., Any], tmp_path: Path) -> _core.Model:
    return core_model(make_student("qwen3", max_position_embeddings=700), tmp_path)


def tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 300, count).astype(np.int32)


def test_any_division_of_a_text_gives_the_same_logits(engine: _core.Model) -> None:
    """600 tokens: more than two chunks, many key blocks and score strips. Integer dots and per-row float sums have one
    order whatever the tile, so the bits are equal."""
    text = tokens(600)
    whole = _core.Session(engine, kv="fp32").forward(text, all_positions=True)
    parts = _core.Session(engine, kv="fp32")
    rows, at = [], 0
    for count in (1, 1, 2, 11, 12, 13, 24, 37, 255, 256, 700):
        part = text[at : at + count]
        if len(part):
            rows.append(parts.forward(part, all_positions=True))
        at += count
    np.testing.assert_allclose(np.concatenate(rows), whole, atol=1e-4 * whole.std(), rtol=0)
    assert parts.position == 600


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_do_not_change_a_bit(make_student: Callable[..., Any], threads: int, tmp_path: Path) -> None:
    model = make_student("llama", {"norm_sites": "all"}, attention_bias=True)
    text = tokens(50)
    one = _core.Session(core_model(model, tmp_path)).forward(text, all_positions=True)
    several = core_model(model, tmp_path, threads=threads)
    assert several.threads == threads
    np.testing.assert_array_equal(_core.Session(several).forward(text, all_positions=True), one)
    session = _core.Session(several)
    rows = [session.forward(text[i : i + 1]) for i in range(50)]
    np.testing.assert_allclose(np.stack(rows), one, atol=1e-4 * one.std(), rtol=0)


def test_last_logits_are_the_last_row(engine: _core.Model) -> None:
    text = tokens(300)
    rows = _core.Session(engine).forward(text, all_positions=True)
    np.testing.assert_array_equal(_core.Session(engine).forward(text), rows[-1])


def test_greedy_decoding_is_the_argmax_step_by_step(engine: _core.Model) -> None:
    session = _core.Session(engine)
    logits = session.forward(tokens(10))
    expected = []
    for _ in range(30):
        expected.append(int(logits.argmax()))
        logits = session.forward(np.array(expected[-1:], np.int32))
    decoding = _core.Session(engine)
    decoding.forward(tokens(10))
    assert decoding.decode(_core.Sampler(), 30) == (expected, "length")
    assert decoding.position == 40


def test_decoding_at_once_or_one_by_one_is_the_same(engine: _core.Model) -> None:
    def generate(sizes: list[int]) -> list[int]:
        session, sampler = _core.Session(engine), _core.Sampler(temperature=1.5, top_p=0.95, seed=11)
        session.forward(tokens(5))
        return [token for size in sizes for token in session.decode(sampler, size)[0]]

    assert generate([24]) == generate([1] * 24) == generate([5, 0, 19])


def test_a_stop_token_ends_the_text_and_is_not_in_it(engine: _core.Model) -> None:
    session = _core.Session(engine)
    session.forward(tokens(10))
    text, _ = session.decode(_core.Sampler(), 20)
    stop = next(token for token in text[5:] if token not in text[: text.index(token)])
    again = _core.Session(engine)
    again.forward(tokens(10))
    assert again.decode(_core.Sampler(), 20, [stop]) == (text[: text.index(stop)], "stop")


def test_text_after_generated_text_continues_it(engine: _core.Model) -> None:
    session = _core.Session(engine, kv="fp32")
    session.forward(tokens(10))
    text, _ = session.decode(_core.Sampler(), 6)
    got = session.forward(tokens(4, seed=1), all_positions=True)
    whole = np.concatenate([tokens(10), np.array(text, np.int32), tokens(4, seed=1)])
    expected = _core.Session(engine, kv="fp32").forward(whole, all_positions=True)[-4:]
    np.testing.assert_allclose(got, expected, atol=1e-4 * expected.std(), rtol=0)


def test_truncate_forgets(engine: _core.Model) -> None:
    session = _core.Session(engine, kv="fp32")
    session.forward(tokens(40))
    session.truncate(13)
    assert session.position == 13
    got = session.forward(tokens(5, seed=2))
    expected = _core.Session(engine, kv="fp32").forward(np.concatenate([tokens(40)[:13], tokens(5, seed=2)]))
    np.testing.assert_allclose(got, expected, atol=1e-4 * expected.std(), rtol=0)
    session.truncate(3)
    with pytest.raises(ValueError, match="call forward"):
        session.decode(_core.Sampler(), 1)
    with pytest.raises(ValueError, match="beyond the text of 3"):
        session.truncate(4)


@pytest.mark.parametrize("first", [1, 2, 17, 18, 60, 61])
def test_scores_are_log_softmax(engine: _core.Model, first: int) -> None:
    text = tokens(60)
    logits = _core.Session(engine).forward(text, all_positions=True)
    expected = log_softmax(logits.astype(np.float64), axis=1)[np.arange(59), text[1:]][first - 1 :]
    session = _core.Session(engine)
    if first == 61:
        with pytest.raises(ValueError, match="beyond the 60 tokens"):
            session.score(text, first)
        return
    np.testing.assert_allclose(session.score(text, first), expected, atol=1e-5)
    # What follows continues from the scored text.
    np.testing.assert_array_equal(
        session.forward(tokens(1)), _core.Session(engine).forward(np.append(text, tokens(1)))
    )


def test_scores_of_a_continuation_start_at_its_first_token(engine: _core.Model) -> None:
    text = tokens(30)
    expected = _core.Session(engine).score(text, 20)
    session = _core.Session(engine)
    session.forward(text[:20])
    np.testing.assert_allclose(session.score(text[20:], 0), expected, atol=1e-4)
    with pytest.raises(ValueError, match="empty session"):
        _core.Session(engine).score(text, 0)


def test_the_context_is_a_limit_and_errors_change_nothing(engine: _core.Model) -> None:
    session = _core.Session(engine, context=20)
    with pytest.raises(ValueError, match=r"21 tokens after 0 exceed the context of 20"):
        session.forward(tokens(21))
    before = session.forward(tokens(15))
    for bad, message in (
        (np.array([], np.int32), "no tokens"),
        (np.array([300], np.int32), "token 300 is outside the vocabulary of 300"),
        (np.array([-1], np.int32), "token -1"),
        (tokens(6), "6 tokens after 15 exceed"),
    ):
        with pytest.raises(ValueError, match=message):
            session.forward(bad)
    assert session.position == 15
    text, reason = session.decode(_core.Sampler(), 50)
    assert (len(text), reason) == (5, "context")
    assert text[0] == int(before.argmax())
    with pytest.raises(ValueError, match="context = 701 is above the model's limit of 700"):
        _core.Session(engine, context=701)


def test_sampling_follows_the_probabilities() -> None:
    """50,000 draws against the softmax, within five standard errors; what top_k and top_p cut never comes."""
    logits = np.array([2.0, 1.0, 0.0, -1.0, np.nan, -np.inf, -40.0], np.float32)
    finite = np.where(np.isfinite(logits), logits, -np.inf)

    def shares(**options: Any) -> np.ndarray:
        sampler = _core.Sampler(seed=5, **options)
        draws = [sampler.sample(logits) for _ in range(50_000)]
        return np.bincount(draws, minlength=7) / len(draws)

    def softmax(temperature: float, kept: int) -> np.ndarray:
        weights = np.exp(finite / temperature) * (np.arange(7) < kept)
        return weights / weights.sum()

    for options, expected in (
        ({"temperature": 1.0}, softmax(1, 7)),
        ({"temperature": 0.5}, softmax(0.5, 7)),
        ({"temperature": 1.0, "top_k": 2}, softmax(1, 2)),
        ({"temperature": 1.0, "top_p": 0.9}, softmax(1, 3)),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.5}, softmax(1, 1)),
    ):
        got = shares(**options)
        assert (np.abs(got - expected) <= 5 * np.sqrt(expected * (1 - expected) / 50_000) + 1e-12).all(), (
            options
        )
    assert _core.Sampler().sample(logits) == 0


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 100, 1000])
def test_greedy_is_the_first_of_the_highest_finite_logits(count: int) -> None:
    rng = np.random.default_rng(count)
    for _ in range(20):
        logits = rng.integers(-3, 3, count).astype(np.float32)  # many ties
        assert _core.Sampler().sample(logits) == int(logits.argmax())
        logits[rng.integers(count, size=count // 3)] = rng.choice([np.nan, np.inf, -np.inf])
        finite = np.where(np.isfinite(logits), logits, -np.inf)
        assert _core.Sampler().sample(logits) == int(finite.argmax())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
    ],
)
def test_impossible_sampling_values(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _core.Sampler(**options)


def test_no_finite_logit_is_an_error() -> None:
    with pytest.raises(ValueError, match="no logit is finite"):
        _core.Sampler().sample(np.full(5, np.nan, np.float32))


def test_sessions_of_one_model_in_many_python_threads(
    make_student: Callable[..., Any], tmp_path: Path
) -> None:
    engine = core_model(make_student("llama"), tmp_path, threads=2)
    expected = [_core.Session(engine).forward(tokens(20, seed)) for seed in range(4)]
    got: dict[int, np.ndarray] = {}

    def work(seed: int) -> None:
        for _ in range(5):
            got[seed] = _core.Session(engine).forward(tokens(20, seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        np.testing.assert_array_equal(got[seed], expected[seed])


def test_several_models_in_one_process(make_student: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = core_model(make_student("llama"), tmp_path / "a", threads=2)
    second = core_model(make_student("qwen3"), tmp_path / "b", threads=2)
    one, two = _core.Session(first), _core.Session(second)
    a, b = one.forward(tokens(5)), two.forward(tokens(5))
    assert not np.array_equal(a, b)
    one.truncate(0)
    np.testing.assert_array_equal(one.forward(tokens(5)), a)


def test_a_profile_counts_from_its_start_and_stays_within_the_clock(engine: _core.Model) -> None:
    session = _core.Session(engine)
    assert session.profile == {}
    session.forward(tokens(200))
    session.start_profile()
    assert set(session.profile.values()) == {0.0}
    started = time.perf_counter()
    session.forward(tokens(50))
    total = time.perf_counter() - started
    assert all(seconds > 0 for seconds in session.profile.values())
    assert sum(session.profile.values()) <= total


def test_memory_figures(engine: _core.Model) -> None:
    session = _core.Session(engine)
    session.forward(tokens(100))
    # 2 layers, 2 KV heads, 8 features (values padded to 16), fp16.
    assert session.memory()["kv_cache"] == 100 * 2 * 2 * (8 + 16) * 2
    memory = engine.memory()
    assert memory["embedding"] == 300 * 32 * 4
    assert memory["head"] == 0
    assert memory["mapped"] == 0
    usage = _core.memory_usage()
    assert 0 < usage["resident"] <= usage["peak_resident"]


@pytest.mark.parametrize(
    ("kv", "bits", "together"),
    [("fp32", 32, 1), ("fp16", 16, 1), ("int8", 8, 4), ("int4", 4, 8), ("int3", 3, 32)],
)
def test_the_cache_takes_the_bytes_of_its_form(
    engine: _core.Model, kv: str, bits: int, together: int
) -> None:
    session = _core.Session(engine, kv=kv)
    session.forward(tokens(10))
    config = engine.config
    heads = config["num_hidden_layers"] * config["num_key_value_heads"]
    # Features of keys are padded to whole runs of codes, those of values to 16.
    key, value = (-(-config["head_dim"] // unit) * unit for unit in (together, 16))
    scales = 2 * 4 if bits <= 8 else 0
    start = 2 * 4 * value if bits < 8 else 0  # position 0, at eight bits, as floats
    assert session.memory()["kv_cache"] == heads * (10 * ((key + value) * bits // 8 + scales) + start)


def test_an_unknown_form_of_the_cache_is_refused(engine: _core.Model) -> None:
    with pytest.raises(ValueError, match="kv = 'int2' is not one of fp16, int8, int4, int3, fp32"):
        _core.Session(engine, kv="int2")
