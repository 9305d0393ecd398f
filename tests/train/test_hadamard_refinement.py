"""Stage 1 with a Hadamard transform: the full-precision function is kept, and what looks at inputs sees it."""

import json

import pytest
import torch
from tiny_encoders import small_encoder, some_batch
from tiny_families import families
from torch.nn import functional as F

from bitdistill.config import RefineConfig
from bitdistill.errors import SurgeryError
from bitdistill.model import TernarySpec
from bitdistill.train.calibration import input_statistics, layers_in_turn, quantisers_off
from bitdistill.train.initialisation import initialise
from bitdistill.train.surgery import refine

SITES = {"o_proj": 0, "down_proj": 0}


@pytest.fixture
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def some_ids() -> torch.Tensor:
    return torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(5))


@pytest.mark.usefixtures("_float64")
@families
def test_a_folded_transform_keeps_the_function_in_float64(make_model, family):
    model = make_model(family)
    student, _ = refine(model, TernarySpec(norm_sites="none", hadamard=SITES))
    transformed = {n: m for n, m in student.named_modules() if getattr(m, "hadamard_block", 0)}
    assert len(transformed) == 4
    with quantisers_off(student):
        for name, linear in transformed.items():
            x, plain = torch.randn(5, linear.in_features), model.get_submodule(name)
            assert linear.weight.dtype == torch.float64
            torch.testing.assert_close(linear(x), F.linear(x, plain.weight, plain.bias), rtol=0, atol=1e-12)
            assert (linear.weight - plain.weight).abs().max() > 0.1
        # Norms and attention of Hugging Face's classes compute in fp32.
        torch.testing.assert_close(student(some_ids()).logits, model(some_ids()).logits, rtol=0, atol=1e-4)


def test_attention_states_have_no_bits_either_while_quantisers_are_off(make_model):
    model = make_model("llama")
    student, _ = refine(model, TernarySpec(norm_sites="none", query_bits=4, kv_bits=3))
    quantised = student(some_ids()).logits
    with quantisers_off(student):
        torch.testing.assert_close(student(some_ids()).logits, model(some_ids()).logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(student(some_ids()).logits, quantised, rtol=0, atol=0)


def test_an_encoders_function_is_kept_as_well():
    model = small_encoder("BertForMaskedLM").eval()
    student, _ = refine(model, TernarySpec(norm_sites="none", hadamard=SITES))
    batch = {key: value for key, value in some_batch().items() if key != "labels"}
    with quantisers_off(student):
        torch.testing.assert_close(student(**batch).logits, model(**batch).logits, rtol=0, atol=1e-4)


def test_without_folding_the_weights_stay_and_the_function_does_not(make_model):
    model = make_model("llama")
    student, _ = refine(model, TernarySpec(norm_sites="none", hadamard=SITES), fold=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(student.state_dict()[name], tensor), name
    with quantisers_off(student):
        assert (student(some_ids()).logits - model(some_ids()).logits).abs().max() > 0.1


def test_learned_scales_start_at_the_folded_weights(make_model):
    student, _ = refine(make_model("llama"), TernarySpec(scale="learned", hadamard=SITES))
    linear = student.model.layers[0].mlp.down_proj
    torch.testing.assert_close(linear.weight_scale.reshape(()), linear.weight.abs().mean())


def test_calibrated_gains_are_those_without_a_transform(make_model):
    """The norm stands before it."""
    batches = [{"input_ids": some_ids()}]
    model = make_model("llama")
    plain, _ = refine(model, TernarySpec(), batches)
    turned, _ = refine(model, TernarySpec(hadamard=SITES), batches)
    gains = [n for n, _ in plain.named_parameters() if n.endswith("_proj.norm.weight")]
    assert len(gains) == 4
    assert all(torch.equal(plain.get_parameter(n), turned.get_parameter(n)) for n in gains)


def test_statistics_are_of_transformed_inputs_and_gptq_fits_them(make_model):
    """An orthonormal transform keeps the length of every input; GPTQ lowers the error of folded weights."""
    batches = [{"input_ids": some_ids()}]
    grams = []
    for sites in ({}, SITES):
        student, _ = refine(make_model("llama"), TernarySpec(norm_sites="none", hadamard=sites))
        _, layer, calls = next(layers_in_turn(student, batches, quantised=False))
        grams.append(input_statistics(layer, calls)["mlp.down_proj"].gram)
    torch.testing.assert_close(grams[0].trace(), grams[1].trace(), rtol=1e-5, atol=0)
    assert (grams[0] - grams[1]).abs().max() > 0.1 * grams[0].abs().max()
    found = initialise(student, batches, RefineConfig(initialisation="gptq", hadamard="outputs"))
    before, after = found.means
    assert after < before


def test_a_block_that_does_not_divide_is_refused_with_the_dimension(make_model):
    with pytest.raises(SurgeryError, match="64 does not divide the input of o_proj, which has 32 features"):
        refine(make_model("llama"), TernarySpec(hadamard={"o_proj": 64}))


def test_refine_on_the_command_line(cli, project, llama, tmp_path):
    def refined(name: str, *settings: str):
        changes = [word for setting in settings for word in ("--set", f"refine.{setting}")]
        return cli("refine", project, "--source", llama, "--output", tmp_path / name, *changes)

    outcome = refined("turned", "hadamard=outputs", "hadamard_block=8", "activation_bits=4")
    assert outcome.status == 0, outcome.err
    config = json.loads((tmp_path / "turned" / "config.json").read_text())
    assert config["ternary"]["hadamard"] == {"o_proj": 8, "down_proj": 8}
    assert config["ternary"]["activation_bits"] == 4
    assert (
        "Hadamard transform of down_proj's input, blocks of 8"
        in (tmp_path / "turned" / "surgery.txt").read_text()
    )
    assert (tmp_path / "turned" / "hadamard.py").is_file()
    record = json.loads((tmp_path / "turned" / "run.json").read_text())["settings"]["refine"]
    assert (record["hadamard"], record["hadamard_block"]) == ("outputs", 8)
    assert refined("plain").status == 0
    record = json.loads((tmp_path / "plain" / "run.json").read_text())["settings"]["refine"]
    assert not [key for key in record if "hadamard" in key]
    outcome = refined("wide", "hadamard=outputs", "hadamard_block=64")
    assert (outcome.status, len(outcome.err.strip().splitlines())) == (1, 1)
    assert "32 features" in outcome.err
