"""The Python face against torch, transformers' templates and float64 numpy."""

import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax
from transformers import AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from bitdistill import Engine, _core
from bitdistill.engine import Conversation, EngineScorer
from bitdistill.engine.rope import rope_frequencies
from bitdistill.errors import EngineError
from bitdistill.evaluate import TorchScorer
from bitdistill.export import export
from bitdistill.train.loading import load_model, load_tokenizer

PROMPT = "the soup was very"


@pytest.fixture(scope="module")
def source(save_student: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_student(tmp_path_factory.mktemp("engine") / "student", "qwen3", {"norm_sites": "subln"})


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engine") / "packed"
    export(source, out, head="f32")
    return out


@pytest.fixture(scope="module")
def engine(packed: Path) -> Engine:
    return Engine(packed, threads=1, kv_cache="fp32")


@pytest.fixture(scope="module")
def model(source: Path) -> Any:
    return load_model(source).eval()


def test_logits_are_torchs(engine: Engine, model: Any) -> None:
    ids = engine.tokens_of(PROMPT)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(engine.logits(ids), expected, atol=1e-4 * expected.std(), rtol=0)


def test_greedy_text_is_transformers_own(engine: Engine, model: Any, source: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    got = engine.generate(PROMPT, max_new_tokens=20)
    ids = expected.tolist()
    ended = 0 in ids
    assert got.tokens == (ids[: ids.index(0)] if ended else ids)
    assert got.finish_reason == ("stop" if ended else "length")
    assert got.text == str(got) == tokenizer.decode(got.tokens, skip_special_tokens=True)
    assert got.prompt_tokens == inputs["input_ids"].shape[1]
    assert got.decode_s > 0


def test_stream_is_the_text_in_pieces(engine: Engine) -> None:
    pieces = list(engine.stream(PROMPT, max_new_tokens=30, temperature=1.5, seed=4))
    assert len(pieces) > 1
    assert "".join(pieces) == engine.generate(PROMPT, max_new_tokens=30, temperature=1.5, seed=4).text


def test_a_seed_decides_the_text(engine: Engine) -> None:
    def text(seed: int) -> str:
        return engine.generate(PROMPT, max_new_tokens=16, temperature=2.0, seed=seed).text

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(6)}) > 1


def test_prompts_of_every_kind_are_the_same_tokens(engine: Engine) -> None:
    ids = engine.text.encode(PROMPT)
    assert engine.tokens_of(PROMPT) == engine.tokens_of(ids) == engine.tokens_of(np.array(ids)) == ids  # type: ignore[arg-type]


@pytest.mark.parametrize("kept", [1, 3])
def test_a_stop_text_ends_the_answer_and_is_not_in_it(engine: Engine, kept: int) -> None:
    whole = engine.generate(PROMPT, max_new_tokens=40, temperature=1.0, seed=3).text
    stop = whole[len(whole) // 2 :][:kept]
    got = engine.generate(PROMPT, max_new_tokens=40, temperature=1.0, seed=3, stop=[stop, "never to be seen"])
    assert got.text == whole[: whole.index(stop)]
    assert got.finish_reason == "stop"


def test_the_context_ends_a_text(engine: Engine) -> None:
    ids = [5] * 250
    got = engine.generate(ids, max_new_tokens=100, temperature=3.0)
    assert len(got.tokens) <= 6
    assert got.finish_reason in ("context", "stop")


def test_a_conversation_reads_only_what_is_new(engine: Engine) -> None:
    conversation = Conversation(engine)
    first = conversation.generate(PROMPT, max_new_tokens=5)
    longer = engine.tokens_of(PROMPT) + first.tokens + engine.text.encode(" view was warm")
    assert (
        conversation.generate(longer, max_new_tokens=8).tokens
        == engine.generate(longer, max_new_tokens=8).tokens
    )
    other = engine.tokens_of("the host seemed")
    assert (
        conversation.generate(other, max_new_tokens=8).tokens
        == engine.generate(other, max_new_tokens=8).tokens
    )
    # The same prompt again: everything is held, one token is read anew.
    assert (
        conversation.generate(other, max_new_tokens=8).tokens
        == engine.generate(other, max_new_tokens=8).tokens
    )


# --- scores ---


def test_scores_and_generations_are_the_torch_scorers(engine: Engine, model: Any, source: Path) -> None:
    tokenizer = load_tokenizer(source)
    rng = np.random.default_rng(0)

    def ids(n: int) -> list[int]:
        return [int(i) for i in rng.integers(2, 300, n)]

    contexts = [ids(9), ids(4), ids(15)]
    requests = [(c, answer) for c in contexts for answer in (ids(1), ids(3), ids(2))]
    torch_scorer, ours = TorchScorer(model, tokenizer), EngineScorer(engine, tokenizer.eos_token_id)
    expected = torch_scorer.log_likelihoods(requests)
    np.testing.assert_allclose(ours.log_likelihoods(requests), expected, atol=2e-3)
    assert ours.generate(contexts, 12) == torch_scorer.generate(contexts, 12)


def test_score_and_classify_are_sums_of_log_probabilities(engine: Engine) -> None:
    labels = [" good", " bad and warm", " zzz"]
    context = engine.tokens_of(PROMPT)
    expected = []
    for label in labels:
        ids = engine.text.encode(label, special=False)
        rows = log_softmax(engine.logits(context + ids).astype(np.float64), axis=1)
        expected.append(sum(rows[len(context) - 1 + i, token] for i, token in enumerate(ids)))
    np.testing.assert_allclose(engine.score(PROMPT, labels), expected, atol=1e-4)
    assert engine.classify(PROMPT, labels) == labels[int(np.argmax(expected))]


# --- sampling: the draw itself, in float64 ---


def splitmix64(seed: int) -> float:
    mask = 2**64 - 1
    x = (seed + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & mask
    return ((x ^ x >> 31) >> 11) * 2.0**-53


@given(
    seed=st.integers(0, 2**63),
    temperature=st.floats(0.2, 3.0),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.05, 1.0),
    scale=st.floats(0.1, 5.0),
)
def test_a_draw_is_the_float64_inverse_of_the_cumulative_sum(
    seed: int, temperature: float, top_k: int, top_p: float, scale: float
) -> None:
    logits = (np.random.default_rng(seed % 1000).normal(size=40) * scale).astype(np.float32)
    got = _core.Sampler(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed).sample(logits)
    order = np.argsort(-logits.astype(np.float64), kind="stable")
    weights = np.exp((logits[order].astype(np.float64) - logits.max()) / temperature)
    weights = weights[:top_k] if top_k else weights
    cut = int(np.searchsorted(np.cumsum(weights), top_p * weights.sum())) + 1 if top_p < 1 else len(weights)
    ids, weights = order[:cut], weights[:cut]
    if not top_k and top_p == 1:  # nothing needs sorting then, and the sum runs in the order of the ids
        ids = np.sort(order)
        weights = np.exp((logits[ids].astype(np.float64) - logits.max()) / temperature)
    edges = np.cumsum(weights) / weights.sum()
    expected = int(np.searchsorted(edges, splitmix64(seed), side="right"))
    close = np.abs(edges - splitmix64(seed)).min() < 1e-9
    assert close or got == ids[min(expected, len(ids) - 1)]


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature = -1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -2}, "top_k = -2"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": -1}, "seed = -1"),
        ({"temperature": "hot"}, "temperature = 'hot'"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens = 2.5"),
        ({"stop": [""]}, "stop text must not be empty"),
    ],
)
def test_impossible_options(engine: Engine, options: dict, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        engine.stream(PROMPT, **options)  # at the call, not at the first piece


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt is empty"),
        ([], "prompt is empty"),
        ([1, 300], "token 300 is outside the vocabulary of 300"),
        ([-1], "token -1"),
        ([4] * 256, "256 tokens leaves no room"),
        ([4] * 257, "257 tokens exceed the model's context of 256"),
        ([{"role": "user", "content": "hi"}], "no chat template"),
    ],
)
def test_impossible_prompts(engine: Engine, prompt: Any, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        engine.generate(prompt, max_new_tokens=4)


def test_other_impossible_calls(engine: Engine, packed: Path) -> None:
    for tokens in ([], [[1, 2]], [1.5]):
        with pytest.raises(EngineError, match="expected a list of ids"):
            engine.logits(tokens)
    with pytest.raises(EngineError, match="exceed the model's context"):
        engine.logits([1] * 257)
    with pytest.raises(EngineError, match="empty continuation"):
        engine.score(PROMPT, [""])
    with pytest.raises(EngineError, match="no labels"):
        engine.classify(PROMPT, [])
    for threads in (0, -1, 5000, 1.5):
        with pytest.raises(EngineError, match=f"threads = {threads}"):
            Engine(packed, threads=threads)  # type: ignore[arg-type]


def test_an_instruction_set_that_does_not_run_is_one_message(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITDISTILL_ISA", "sse2")
    with pytest.raises(EngineError, match="BITDISTILL_ISA = 'sse2' is unknown; this build has scalar"):
        Engine(packed)


# --- one process, many users; no torch ---


def test_many_threads_and_several_engines_agree_with_one(engine: Engine, packed: Path) -> None:
    engines = [
        Engine(packed, threads=2, kv_cache="fp32"),
        Engine(packed, threads=1, kv_cache="fp32", mmap=True),
    ]
    prompts = ["the room", "the host was", "the view seemed", "the soup"]
    expected = [engine.generate(p, max_new_tokens=12).tokens for p in prompts]
    got: dict[tuple[int, int], list[int]] = {}

    def work(which: int, index: int) -> None:
        got[which, index] = engines[which].generate(prompts[index], max_new_tokens=12).tokens

    threads = [threading.Thread(target=work, args=(w, i)) for w in (0, 1) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[w, i] for w in (0, 1) for i in range(4)] == expected * 2


def test_python_runs_while_the_engine_computes() -> None:
    """The other thread is woken, and nobody is made to give the GIL up: it can run only if a call of the core does."""
    wake, ran = threading.Event(), threading.Event()
    other = threading.Thread(target=lambda: wake.wait() and ran.set())
    other.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        wake.set()
        calls = 0
        while not ran.is_set() and calls < 200:  # a busy machine may be slow to wake it
            _core.probe_int8(1, 0.02)
            calls += 1
        released = ran.is_set()
    finally:
        sys.setswitchinterval(interval)
        other.join()
    assert released


def test_no_torch_after_a_generation(packed: Path) -> None:
    code = f"""
import sys
import bitdistill
assert not any(name.startswith("bitdistill.engine") for name in sys.modules)
from bitdistill import Engine
engine = Engine({str(packed)!r}, threads=1)
assert engine.generate("the soup was", max_new_tokens=4).tokens
engine.classify("the soup was", [" good", " bad"]); engine.info
print([n for n in ("torch", "transformers", "datasets", "accelerate") if n in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_info_says_what_runs_where(engine: Engine, packed: Path) -> None:
    info = engine.info
    assert info["isa"] in _core.available_isas()
    assert (info["threads"], info["kv_cache"], info["max_context"]) == (1, "fp32", 256)
    # 2 layers: q 32x32, k and v 16x32, o 32x32, gate and up 48x32, down 32x48.
    assert info["ternary_parameters"] == 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    assert info["bytes_by_part"]["embedding"] == 300 * 32 * 4
    assert info["bytes"] == sum(info["bytes_by_part"].values())
    assert 0 < info["bytes"] <= (packed / "model.safetensors").stat().st_size


# --- RoPE, against transformers' own functions ---

ROPES: Sequence[dict] = [
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32, "rope_theta": 10000.0,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0},
    {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512, "rope_theta": 1e6,
        "beta_fast": 16, "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 0.9, "truncate": False,
    },
]  # fmt: skip


@pytest.mark.parametrize("rope", ROPES, ids=lambda r: r["rope_type"])
def test_rope_frequencies_are_transformers(make_model: Callable[..., Any], rope: dict) -> None:
    reference = make_model("llama", rope_parameters=rope, head_dim=64)
    if rope["rope_type"] == "default":
        expected, scale = reference.model.rotary_emb.inv_freq, 1.0
    else:
        expected, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](reference.config, "cpu")
    got, factor = rope_frequencies(reference.config.to_dict(), 64)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6)  # float32 in another order
    assert factor == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_type": "longrope"}, "rope_type 'longrope' is not one of"),
        ({"rope_type": "linear"}, "factor = None"),
        ({"rope_theta": -1}, "rope_theta = -1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_unknown_rope_settings_are_errors(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rope_frequencies({"rope_parameters": {"rope_theta": 1e4} | change}, 8)
    old = {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}}
    assert rope_frequencies(old, 8) == rope_frequencies(new, 8)
