"""Every family of the table in the engine, in every room, beside transformers; and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import parity
import pytest
from parity import differing_codes, torch_codes
from tiny_families import FAMILY_NAMES, families
from transformers import PreTrainedTokenizerFast

from bitdistill import Engine
from bitdistill.engine.families import FAMILIES as ENGINE_FAMILIES
from bitdistill.engine.loading import PackedModel
from bitdistill.errors import CheckpointError
from bitdistill.export import export
from bitdistill.train.loading import load_model

PROMPTS = Path(__file__).parents[2] / "benchmarks" / "parity" / "prompts_reviews.txt"


def test_the_engine_runs_every_family() -> None:
    assert {f"bit_{name}" for name in FAMILY_NAMES} | {"bitnet"} == set(ENGINE_FAMILIES)


@families
def test_an_exported_student_is_torchs(
    save_student: Callable[..., Path],
    tokenizer: PreTrainedTokenizerFast,
    isa: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
) -> None:
    """Windows shorter than the text, layers of both kinds, norms, activations and scales of the family."""
    monkeypatch.setenv("BITDISTILL_ISA", isa)
    source = save_student(tmp_path / "student", family, {"norm_sites": "all"})
    export(source, tmp_path / "packed", head="f32")
    engine, model = Engine(tmp_path / "packed", kv_cache="fp32"), load_model(source).eval()
    assert engine.core.isa == isa
    ids = list(tokenizer("the soup was cold and the host seemed very tired of it")["input_ids"])
    assert len(ids) > 8  # windows are of 4
    got, taps = engine.session().forward_tapped(np.array(ids, np.int32))
    _, codes = torch_codes(model, ids, taps)
    assert differing_codes(codes, taps) <= 1e-3 * sum(code.size for code in codes.values())
    expected, _ = torch_codes(model, ids)
    np.testing.assert_allclose(got[0], expected[0], atol=1e-4 * expected.std(), rtol=0)
    assert np.abs(got - expected).mean() < 0.01 * expected.std()


@families
def test_greedy_text_leaves_torchs_only_at_near_ties(
    save_student: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    """Twenty prompts, 64 tokens each; trits and activation codes on the way."""
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()
    report = parity.compare(save_student(tmp_path / "student", family, {}), prompts, 64, threads=1)
    assert parity.failures(report) == []
    assert report["prompts"] == 20


@pytest.mark.parametrize("model_type", ["bit_gpt2", "gemma3"])
def test_the_engine_refuses_a_packed_model_that_it_does_not_run(
    save_student: Callable[..., Path], tmp_path: Path, model_type: str
) -> None:
    packed = tmp_path / "packed"
    export(save_student(tmp_path / "student", "llama", {}), packed)
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    with pytest.raises(
        CheckpointError, match=f"model_type '{model_type}' is not one of bit_llama.*another model"
    ):
        PackedModel.open(packed)


def test_export_refuses_a_student_that_the_engine_does_not_run(
    save_student: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_student(tmp_path / "student", "llama", {})
    monkeypatch.delitem(ENGINE_FAMILIES, "bit_llama")
    with pytest.raises(
        CheckpointError, match=r"does not run models of type 'bit_llama' yet.*bitdistill eval"
    ):
        export(source, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0"),
        ("gemma3_text", {"hidden_activation": "gelu"}, "hidden_activation = 'gelu'"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "nothing for sliding_attention",
        ),
        ("mistral", {"sliding_window": -1}, "sliding_window = -1"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers"),
    ],
)
def test_settings_that_the_engine_would_pass_over_are_refused(
    save_student: Callable[..., Path], tmp_path: Path, family: str, change: dict, message: str
) -> None:
    packed = tmp_path / "packed"
    export(save_student(tmp_path / "student", family, {}), packed)
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message):
        Engine(packed)
