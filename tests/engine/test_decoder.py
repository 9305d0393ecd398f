"""The engine's decoder against torch, on students of every shape, in exact mode and in every room.

Weights are the same trits, so the integer dot products are the same, and what is left is the rounding of fp32 sums. A
value that lies within that rounding of a tie gets another activation code, and what follows from it differs by more
than rounding: 99.9 % of the codes must agree where torch's layers are given the engine's states, and logits to rounding
up to the first position where one does not.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_student import core_model, int4_groups, int4_values, int8_rows
from parity import differing_codes, torch_codes
from transformers import LlamaConfig

from bitdistill import _core

TOKENS = 48


def check_parity(model: Any, engine: _core.Model, tokens: int = TOKENS) -> None:
    torch.manual_seed(7)
    ids = torch.randint(0, model.config.vocab_size, (tokens,))
    got, taps = _core.Session(engine, kv="fp32").forward_tapped(ids.numpy().astype(np.int32))
    _, codes = torch_codes(model, ids, taps)
    assert {name for name in taps if name.endswith(".code")} == {f"{name}.code" for name in codes}
    total, flips = sum(code.size for code in codes.values()), differing_codes(codes, taps)
    assert flips <= 1e-3 * total, f"{flips} of {total} codes differ"

    expected, codes = torch_codes(model, ids)
    different = np.stack([(taps[f"{name}.code"] != code).any(axis=1) for name, code in codes.items()]).any(
        axis=0
    )
    # Causal: before the first position with another code, nothing but rounding differs.
    same = int(different.argmax()) if different.any() else tokens
    assert same >= 4
    spread = expected.std()
    np.testing.assert_allclose(got[:same], expected[:same], atol=2e-5 * spread, rtol=0)
    assert np.abs(got - expected).mean() < 0.01 * spread


STUDENTS: list[tuple[str, dict, dict]] = [
    ("llama", {}, {}),
    ("qwen3", {}, {}),
    ("qwen3", {"norm_sites": "all"}, {"tie_word_embeddings": False}),
    ("llama", {"norm_sites": "none"}, {"attention_bias": True, "mlp_bias": True}),
    ("qwen3", {"granularity": "channel"}, {"attention_bias": True}),
    ("llama", {"granularity": "block", "block_size": 16}, {}),
    ("qwen3", {"granularity": "block", "block_size": 7, "norm_sites": "all"}, {}),
    ("qwen3", {"skip": ["*.down_proj", "*.0.self_attn.k_proj", "*.up_proj"]}, {}),
    ("llama", {"norm_sites": "all", "skip": ["*.v_proj", "*.gate_proj"]}, {"attention_bias": True}),
    ("qwen3", {}, {"head_dim": 24, "num_attention_heads": 6, "num_key_value_heads": 1}),
    ("llama", {}, {"hidden_size": 100, "intermediate_size": 77, "vocab_size": 333, "head_dim": 10}),
    ("llama", {}, {"num_key_value_heads": 4}),
]


@pytest.mark.parametrize(("family", "ternary", "changes"), STUDENTS)
def test_logits_and_codes_are_torchs(
    make_student: Callable[..., Any], isa: str, family: str, ternary: dict, changes: dict, tmp_path: Path
) -> None:
    model = make_student(family, ternary, **changes)
    check_parity(model, core_model(model, tmp_path, isa=isa))


ROPES = [
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 10000.0,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0},
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_rotary_variants(make_student: Callable[..., Any], rope: dict, tmp_path: Path) -> None:
    """Up to the last position the model allows."""
    model = make_student("llama", rope_parameters=rope)
    assert isinstance(model.config, LlamaConfig)
    length = model.config.max_position_embeddings
    check_parity(model, core_model(model, tmp_path), tokens=length)


def test_bitnet_with_its_sub_norms_and_squared_relu(bitnet: Any, isa: str, tmp_path: Path) -> None:
    check_parity(bitnet, core_model(bitnet, tmp_path, isa=isa))


def test_bf16_tables_and_linears_are_torchs_after_rounding(
    make_student: Callable[..., Any], isa: str, tmp_path: Path
) -> None:
    model = make_student("qwen3", {"skip": ["*.o_proj"]}, tie_word_embeddings=False)
    engine = core_model(model, tmp_path, table="BF16", dense="BF16", isa=isa)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name or "lm_head" in name or name.endswith("o_proj.weight"):
                parameter.copy_(parameter.bfloat16().float())
    check_parity(model, engine)


@pytest.mark.parametrize(("table", "quantise"), [("I8", int8_rows), ("I4", int4_groups)])
def test_integer_tables_are_torchs_with_the_quantised_tables(
    make_student: Callable[..., Any], isa: str, tmp_path: Path, table: str, quantise: Callable
) -> None:
    model = make_student("llama", tie_word_embeddings=True)
    engine = core_model(model, tmp_path, table=table, isa=isa)
    with torch.no_grad():
        weight = model.model.embed_tokens.weight
        code, scale = quantise(weight)
        weight.copy_(torch.from_numpy(code * scale if table == "I8" else int4_values(code, scale)))
    torch.manual_seed(7)
    ids = torch.randint(0, 300, (TOKENS,))
    expected, _ = torch_codes(model, ids)
    got = _core.Session(engine, kv="fp32").forward(ids.numpy().astype(np.int32), all_positions=True)
    # The head adds the 15-bit split of its input: peak / 65000 a feature.
    assert np.abs(got - expected)[:4].max() < 2e-3 * expected.std()
    assert np.abs(got - expected).mean() < 0.01 * expected.std()


def test_caches_of_fp16_and_int8_stay_near_fp32(
    make_student: Callable[..., Any], isa: str, tmp_path: Path
) -> None:
    model = make_student("qwen3")
    engine = core_model(model, tmp_path, isa=isa)
    ids = np.random.default_rng(0).integers(0, 300, TOKENS).astype(np.int32)
    exact = _core.Session(engine, kv="fp32").forward(ids, all_positions=True)
    half = _core.Session(engine).forward(ids, all_positions=True)
    codes = _core.Session(engine, kv="int8").forward(ids, all_positions=True)
    assert 0 < np.abs(half - exact).mean() < 0.05 * exact.std()
    assert 0 < np.abs(codes - exact).mean() < 0.1 * exact.std()
