"""H-BitLinear in students: where the transform stands, of what size it is, and what the config says of it."""

import json

import numpy as np
import pytest
import scipy.linalg
import torch
from test_students import families, make_dense, make_student, some_ids
from tiny_encoders import small_encoder_student, some_batch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from bitdistill.model import STUDENT_CLASSES, BitLinear, TernarySpec

SITES = {"o_proj": 0, "down_proj": 0}


def rotated(x: torch.Tensor, block: int) -> torch.Tensor:
    """By scipy's matrix, in float64."""
    matrix = torch.from_numpy(scipy.linalg.hadamard(block) / np.sqrt(block))
    return (x.double().unflatten(-1, (-1, block)) @ matrix.T).flatten(-2).to(x.dtype)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("norm_eps", [None, 1e-6])
def test_the_transform_stands_between_norm_and_quantiser(bits, norm_eps):
    """Against a plain BitLinear on inputs that the test has transformed; of whole numbers every sum is exact."""
    spec = TernarySpec(activation_bits=bits)
    linear = BitLinear(24, 7, bias=True, spec=spec, norm_eps=norm_eps, hadamard_block=4)
    plain = BitLinear(24, 7, bias=True, spec=spec, norm_eps=None)
    plain.load_state_dict({"weight": linear.weight, "bias": linear.bias})
    x = torch.randint(-9, 10, (2, 5, 24)).float()
    normed = x
    if linear.norm is not None:
        with torch.no_grad():
            linear.norm.weight.uniform_(0.5, 2.0)
        normed = linear.norm(x)
        torch.testing.assert_close(linear.inputs(x), rotated(normed, 4))
        assert torch.equal(linear(x), plain(linear.inputs(x)))
    else:
        assert torch.equal(linear.inputs(x), rotated(x, 4))
        assert torch.equal(linear(x), plain(rotated(x, 4)))
    assert not torch.allclose(linear(x), plain(normed))


def test_gradients_are_those_of_the_dense_product():
    """Straight through the quantiser, then through the matrix."""
    linear = BitLinear(
        24, 7, bias=False, spec=TernarySpec(activation_bits=4), norm_eps=None, hadamard_block=8
    )
    x, upstream = torch.randn(6, 24, requires_grad=True), torch.randn(6, 7)
    linear(x).backward(upstream)
    weight = linear.weight.detach()
    step = weight.abs().mean()
    through = upstream @ ((weight / step).round().clamp(-1, 1) * step)
    torch.testing.assert_close(x.grad, rotated(through, 8))


def test_bf16_stays_bf16_outside():
    linear = BitLinear(24, 7, bias=False, spec=TernarySpec(), norm_eps=1e-6, hadamard_block=8).bfloat16()
    assert linear(torch.randn(3, 24).bfloat16()).dtype == torch.bfloat16
    assert linear.inputs(torch.randn(3, 24).bfloat16()).dtype == torch.float32


@families
def test_a_student_with_it_is_the_dense_model_with_transformed_inputs(family):
    ternary = {"norm_sites": "none", "activation_bits": 16, "hadamard": SITES}
    student = make_student(family, ternary)
    # o_proj has 4 heads of 16, down_proj 80 = 5 x 16 features
    assert student.config.ternary["hadamard"] == {"o_proj": 64, "down_proj": 16}
    dense = make_dense(student, family)
    before = dense(some_ids()).logits
    for name, module in dense.named_modules():
        site = name.rpartition(".")[2]
        if isinstance(student.get_submodule(name), BitLinear):
            scale = module.weight.abs().mean()
            module.weight.data = (module.weight / scale).round().clamp(-1, 1) * scale
        if site in SITES:
            block = {"o_proj": 64, "down_proj": 16}[site]
            module.register_forward_pre_hook(lambda _, args, block=block: rotated(args[0], block))
    logits = student(some_ids()).logits
    torch.testing.assert_close(logits, dense(some_ids()).logits, rtol=1e-4, atol=1e-4)
    assert (logits - before).abs().max() > 0.1


def test_an_encoder_has_the_same_two_sites(tmp_path):
    student = small_encoder_student("BertForMaskedLM", {"hadamard": {"o_proj": 0, "down_proj": 4}})
    blocks = {name: m.hadamard_block for name, m in student.named_modules() if isinstance(m, BitLinear)}
    width = student.config.hidden_size & -student.config.hidden_size
    assert student.config.ternary["hadamard"] == {"o_proj": width, "down_proj": 4}
    for name, block in blocks.items():
        expected = width if name.endswith("attention.output.dense") else 0
        assert block == (4 if name.endswith(f"{name.split('.')[3]}.output.dense") else expected), name
    batch = {key: value for key, value in some_batch().items() if key != "labels"}
    student.save_pretrained(tmp_path)
    reloaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(reloaded.eval()(**batch).logits, student.eval()(**batch).logits)
    assert reloaded.config.ternary == student.config.ternary


def test_the_config_names_resolved_blocks_and_nothing_without_them(tmp_path):
    make_student("llama", {"hadamard": SITES}).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["ternary"]
    assert stored["hadamard"] == {"o_proj": 64, "down_proj": 16}
    assert "hadamard" not in make_student("llama").config.ternary
    assert TernarySpec(**stored).to_dict() == stored
    assert hash(TernarySpec(**stored)) == hash(TernarySpec(**stored))


@families
def test_a_saved_student_gives_the_same_logits(family, tmp_path):
    student = make_student(family, {"hadamard": {"o_proj": 8, "down_proj": 0}, "activation_bits": 4})
    student.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {m.hadamard_block for m in reloaded.modules() if isinstance(m, BitLinear)} == {0, 8, 16}
    assert torch.equal(reloaded(some_ids()).logits, student(some_ids()).logits)


def test_a_site_that_stays_full_precision_is_not_named():
    student = make_student("llama", {"hadamard": SITES, "skip": ["*.o_proj"]})
    assert student.config.ternary["hadamard"] == {"down_proj": 16}
    with pytest.raises(ValueError, match="leave no site to transform"):
        make_student("llama", {"hadamard": SITES, "skip": ["*.o_proj", "*.down_proj"]})


@pytest.mark.parametrize(
    ("hadamard", "message"),
    [
        ({"q_proj": 8}, "use sites of o_proj, down_proj"),
        ({"o_proj": 12}, "use powers of two, or 0"),
        ({"o_proj": -2}, "use powers of two, or 0"),
        ({"o_proj": 8.0}, "use powers of two, or 0"),
        ({"down_proj": 32}, "32 does not divide the input of down_proj, which has 80 features: use 16"),
    ],
)
def test_what_it_refuses(hadamard, message):
    config_class, model_class, *_ = STUDENT_CLASSES["llama"]
    fields = make_student("llama").config.to_dict()
    fields = {key: value for key, value in fields.items() if key not in ("ternary", "model_type")}
    with pytest.raises(ValueError, match=message):
        model_class(config_class(ternary={"hadamard": hadamard}, **fields))


def test_warm_up_mixes_transformed_inputs():
    linear = BitLinear(24, 7, bias=False, spec=TernarySpec(), norm_eps=None, hadamard_block=8)
    linear.quant_lambda = 0.0
    x = torch.randn(4, 24)
    torch.testing.assert_close(linear(x), F.linear(rotated(x, 8), linear.weight))
