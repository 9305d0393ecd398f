"""BitNet v2 students in the engine, against torch: Hadamard transforms, 4-bit activations, low-bit attention states.

Exact mode is a cache of fp32 that holds what the model's bits leave of keys and values. Over codes attention splits
queries and weights in two int8 codes each, which is 1e-5 of their peaks: another bound, stated below.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_student import core_model
from parity import differing_codes, torch_codes
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bitdistill import Engine, _core
from bitdistill.engine.shapes import find_shape, random_model
from bitdistill.errors import CheckpointError
from bitdistill.export import export

V2 = {"activation_bits": 4, "hadamard": {"o_proj": 0, "down_proj": 0}}
TOKENS = 40


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Absmax of every row, as unsigned codes around a zero point."""
    step = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    step = torch.where(step == 0, 1.0, step)
    zero = 2 ** (bits - 1)
    return (((x / step).round() + zero).clamp(0, 2**bits - 1) - zero) * step


def low_bit_attention(query_bits: int, kv_bits: int) -> str:
    """Register torch's attention over quantised states ``[B, H, T, E]`` of whole sequences; returns its name."""

    def attend(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if query_bits < 16:
            query = rounded(query, query_bits)
        if kv_bits < 16:
            key, value = (
                torch.cat([rounded(x[:, :, :1], 8), rounded(x[:, :, 1:], kv_bits)], dim=2)
                for x in (key, value)
            )
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    name = f"test_q{query_bits}_kv{kv_bits}"
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def random_ids(model: Any) -> torch.Tensor:
    torch.manual_seed(7)
    return torch.randint(0, model.config.vocab_size, (TOKENS,))


def check_parity(model: Any, engine: _core.Model, kv: str, rounding: float) -> None:
    """As in ``test_decoder``; ``rounding``: of logits, in standard deviations, before the first code that differs."""
    ids = random_ids(model)
    got, taps = _core.Session(engine, kv=kv).forward_tapped(ids.numpy().astype(np.int32))
    _, codes = torch_codes(model, ids, taps)
    assert {name for name in taps if name.endswith(".code")} == {f"{name}.code" for name in codes}
    flips = differing_codes(codes, taps)
    assert flips <= 1e-3 * sum(code.size for code in codes.values())

    expected, codes = torch_codes(model, ids)
    different = np.stack([(taps[f"{name}.code"] != code).any(axis=1) for name, code in codes.items()])
    same = int(different.any(axis=0).argmax()) if different.any() else TOKENS
    assert same >= 4
    np.testing.assert_allclose(got[:same], expected[:same], atol=rounding * expected.std(), rtol=0)


STUDENTS: list[tuple[str, dict, dict]] = [
    ("llama", V2, {}),
    ("qwen3", V2 | {"activation_bits": 8}, {}),
    ("llama", {"activation_bits": 4}, {}),
    ("qwen3", V2 | {"norm_sites": "all", "hadamard": {"o_proj": 4, "down_proj": 8}}, {}),
    ("llama", V2 | {"norm_sites": "none", "skip": ["*.down_proj"]}, {}),
    ("llama", V2 | {"skip": ["*.gate_proj"]}, {}),
    ("llama", V2 | {"skip": ["*.up_proj"]}, {}),
    ("llama", V2 | {"granularity": "block", "block_size": 16}, {}),
]


@pytest.mark.parametrize(("family", "ternary", "changes"), STUDENTS)
def test_logits_and_codes_are_torchs(
    make_student: Callable[..., Any], isa: str, family: str, ternary: dict, changes: dict, tmp_path: Path
) -> None:
    model = make_student(family, ternary, **changes)
    check_parity(model, core_model(model, tmp_path, isa=isa), "fp32", 2e-5)


@pytest.mark.parametrize(("query_bits", "kv_bits"), [(16, 4), (4, 4), (8, 3), (16, 8), (4, 16)])
def test_low_bit_states_are_torchs(
    make_student: Callable[..., Any], isa: str, query_bits: int, kv_bits: int, tmp_path: Path
) -> None:
    # Biases: values that are small whole numbers times a scale would lie on ties.
    model = make_student("qwen3", V2, attention_bias=True)
    model.config._attn_implementation = low_bit_attention(query_bits, kv_bits)
    settings = {"query_bits": query_bits, "kv_bits": kv_bits}
    engine = core_model(model, tmp_path, settings=settings, isa=isa)
    check_parity(model, engine, "fp32", 2e-5)
    if kv_bits < 16:
        check_parity(model, engine, f"int{kv_bits}", 2e-4)


def test_a_cache_of_few_bits_rounds_what_the_model_does_not(
    make_student: Callable[..., Any], tmp_path: Path
) -> None:
    """The form alone asks for four bits: the arithmetic is that of a model that does."""
    model = make_student("qwen3", V2)
    plain = core_model(model, tmp_path)
    ids = random_ids(model).numpy().astype(np.int32)
    got = _core.Session(plain, kv="int4").forward(ids, all_positions=True)
    asked = core_model(model, tmp_path, settings={"kv_bits": 4})
    np.testing.assert_array_equal(got, _core.Session(asked, kv="int4").forward(ids, all_positions=True))
    assert np.abs(got - _core.Session(plain, kv="fp32").forward(ids, all_positions=True)).max() > 0.01


@pytest.fixture
def packed(save_student: Callable[..., Path], tmp_path: Path) -> Path:
    export(save_student(tmp_path / "student", "qwen3", V2), tmp_path / "packed", head="f32")
    return tmp_path / "packed"


def change(folder: Path, **packed: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["packed"] |= packed
    path.write_text(json.dumps(config))


def test_the_model_chooses_its_cache_and_the_user_another(packed: Path) -> None:
    assert Engine(packed, threads=1).kv_cache == "fp16"
    for bits, form in ((4, "int4"), (3, "int3"), (8, "int8")):
        change(packed, kv_bits=bits)
        engine = Engine(packed, threads=1)
        assert engine.kv_cache == form
        assert Engine(packed, threads=1, kv_cache="fp32").kv_cache == "fp32"
    change(packed, kv_bits=4, query_bits=4)
    engine = Engine(packed, threads=2)
    texts = [engine.generate(prompt, max_new_tokens=12) for prompt in ("the soup", "the host was very")]
    together = engine.generate_batch(["the soup", "the host was very"], max_new_tokens=12)
    assert [text.tokens for text in texts] == [text.tokens for text in together]


@pytest.mark.parametrize(
    ("change_to", "message"),
    [
        ({"activation_bits": 3}, r"activation_bits = 3: the engine runs 8, 4"),
        ({"query_bits": 5}, r"query_bits = 5: the engine runs 16, 8, 4"),
        ({"kv_bits": "4"}, r"kv_bits = '4': the engine runs 16, 8, 4, 3"),
        ({"hadamard": {"q_proj": 8}}, r"hadamard = 'q_proj' is not one of o_proj, down_proj"),
        ({"hadamard": {"o_proj": 24}}, r"hadamard block 24 of o_proj is not a power of two that divides"),
        ({"hadamard": {"down_proj": 1 << 17}}, r"hadamard block 131072 of down_proj"),
        ({"hadamard": [8]}, r"hadamard = \[8\]: expected sites"),
        ({"hadamard": []}, r"hadamard = \[\]: expected sites"),
        ({"kv_bits": [4]}, r"kv_bits = \[4\]: the engine runs 16, 8, 4, 3"),
        ({"format_version": 1}, r"format_version 1 has no such setting"),
    ],
)
def test_settings_that_no_kernel_runs_are_refused(packed: Path, change_to: dict, message: str) -> None:
    change(packed, **change_to)
    with pytest.raises(CheckpointError, match=message):
        Engine(packed, threads=1)


def test_a_text_at_once_is_the_text_in_parts_on_any_number_of_threads() -> None:
    """Threads share rows and tokens out; a look-up takes 64 blocks of 32 rows, here of 70, and 16 tokens or more, where
    parts of 7 are multiplied."""
    sizes = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 2240,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
    }
    shape = find_shape("bitnet-v2-1.3b", 4) | sizes
    shape["packed"] = shape["packed"] | {"hadamard": {"o_proj": 64, "down_proj": 64}}
    texts = [np.random.default_rng(n).integers(0, 128, n).astype(np.int32) for n in (15, 16, 17, 63, 265)]
    for threads in (1, 2, 3, 7, 20):
        model = random_model(shape, "int8", threads=threads)
        for text in texts:
            session = _core.Session(model, kv="int4")
            parts = [session.forward(text[i : i + 7], all_positions=True) for i in range(0, len(text), 7)]
            whole = _core.Session(model, kv="int4").forward(text, all_positions=True)
            np.testing.assert_array_equal(whole, np.concatenate(parts))
