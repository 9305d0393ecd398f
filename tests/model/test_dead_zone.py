"""The bias of dead weights: values and gradients by explicit loops, the biases that it folds into, what is stored."""

import json

import pytest
import torch
from tiny_families import small_student

from bitdistill.model import BitLinear, TernarySpec
from bitdistill.train.size import model_size

SHARE = 0.25


def bit_linear(*, bias: bool, **spec: object) -> BitLinear:
    spec = TernarySpec(dead_zone_bias=SHARE, activation_bits=16, **spec)
    return BitLinear(10, 6, bias=bias, spec=spec, norm_eps=None)


def by_loops(linear: BitLinear, x: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and gradient of the latents in float64, one element at a time; one scale for the tensor."""
    w, x, upstream = (t.detach().double() for t in (linear.weight, x, upstream))
    scale = w.abs().mean()
    y, grad = torch.zeros(len(x), 6).double(), torch.zeros(6, 10).double()
    for n in range(6):
        for k in range(10):
            dead = bool(w[n, k].abs() <= scale / 2)
            code = 0.0 if dead else float(w[n, k].sign())
            for b in range(len(x)):
                y[b, n] += code * scale * x[b, k] + dead * SHARE * w[n, k]
                grad[n, k] += upstream[b, n] * (x[b, k] + dead * SHARE)
    if linear.bias is not None:
        y += linear.bias.detach().double()
    return y, grad


@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_the_definition(bias):
    linear, x, upstream = bit_linear(bias=bias), torch.randn(3, 10), torch.randn(3, 6)
    y = linear(x)
    y.backward(upstream)
    expected, gradient = by_loops(linear, x, upstream)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(linear.weight.grad.double(), gradient, rtol=1e-5, atol=1e-6)
    plain = BitLinear(10, 6, bias=bias, spec=TernarySpec(activation_bits=16), norm_eps=None)
    plain.load_state_dict(linear.state_dict())
    assert (plain(x) - y).abs().max() > 1e-3


def test_the_warm_up_mixes_it_in_with_the_codes():
    linear, x = bit_linear(bias=False), torch.randn(3, 10)
    linear.quant_lambda = 0.0
    assert torch.equal(linear(x), x @ linear.weight.T)
    linear.quant_lambda = 0.5
    plain = bit_linear(bias=False)
    plain.load_state_dict(linear.state_dict())
    torch.testing.assert_close(linear(x), (x @ linear.weight.T + plain(x)) / 2)


def test_it_folds_into_the_biases_of_a_student_without_it():
    shapes = {"attention_bias": True, "mlp_bias": True}
    student = small_student("llama", {"dead_zone_bias": SHARE}, **shapes)
    folded = small_student("llama", {}, **shapes)
    folded.load_state_dict(student.state_dict())
    ids = torch.randint(2, 300, (2, 9))
    assert not torch.allclose(student(ids).logits, folded(ids).logits, atol=1e-2)
    linears = [m for m in folded.modules() if isinstance(m, BitLinear)]
    assert len(linears) == 14
    with torch.no_grad():
        for linear in linears:
            dead = linear.weight.abs() <= linear.weight.abs().mean() / 2
            assert 0.1 < dead.float().mean() < 0.6
            linear.bias += SHARE * (linear.weight * dead).sum(dim=1)
    torch.testing.assert_close(student(ids).logits, folded(ids).logits, rtol=1e-5, atol=1e-5)


def test_its_bytes_are_those_of_the_biases_it_folds_into():
    plain, dead = (model_size(small_student("llama", spec)) for spec in ({}, {"dead_zone_bias": 1e-3}))
    rows = 2 * (2 * 32 + 2 * 16 + 2 * 48 + 32)
    assert dead.bytes - plain.bytes == 2 * rows
    with_biases = {"attention_bias": True, "mlp_bias": True}
    plain, dead = (
        model_size(small_student("llama", s, **with_biases)) for s in ({}, {"dead_zone_bias": 1e-3})
    )
    assert dead.bytes == plain.bytes


def test_stage_1_stores_it_and_stores_nothing_without_it(cli, project, llama, student, tmp_path):
    outcome = cli(
        "refine",
        project,
        "--source",
        llama,
        "--output",
        tmp_path / "new",
        "--set",
        "refine.dead_zone_bias=1e-3",
    )
    assert outcome.status == 0, outcome.err
    found = []
    for folder in (tmp_path / "new", student):
        ternary = json.loads((folder / "config.json").read_text())["ternary"]
        record = json.loads((folder / "run.json").read_text())["settings"]["refine"]
        found.append((ternary.get("dead_zone_bias"), record.get("dead_zone_bias")))
    assert found == [(1e-3, 1e-3), (None, None)]
