"""Annealed soft codes: values and gradients against autograd in float64, the hard limit, the schedule, a resume."""

import json
import math
from dataclasses import replace

import pytest
import torch
from pair import STOPPED, stopped_at
from training import train

from bitdistill.config import TrainingConfig
from bitdistill.model import BitLinear, TernarySpec
from bitdistill.model.quant import soft_ternarize, ternarize, weight_scale
from bitdistill.plan.memory import TrainingStep, step_memory
from bitdistill.plan.models import Blueprint, config_text
from bitdistill.train.schedule import HARDEST, SOFTEST, soft_temperature_at
from bitdistill.train.surgery import refine
from bitdistill.train.trainer import training_settings


def scales(latent: torch.Tensor, granularity: str) -> torch.Tensor:
    """Mean magnitudes of a ``[6, 10]`` matrix, one for each weight; blocks are of 5 columns."""
    magnitude = latent.abs()
    if granularity == "tensor":
        return magnitude.mean().expand(6, 10)
    if granularity == "channel":
        return magnitude.mean(dim=1, keepdim=True).expand(6, 10)
    return magnitude.view(6, 2, 5).mean(dim=2).repeat_interleave(5, dim=1)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
@pytest.mark.parametrize("temperature", [2.0, 0.5, 0.02])
def test_values_and_gradients_are_those_of_the_softmax(granularity, temperature):
    latent = torch.randn(6, 10, requires_grad=True)
    upstream = torch.randn(6, 10)
    soft_ternarize(latent, temperature, granularity, 5).backward(upstream)
    wide = latent.detach().double().requires_grad_()
    scale = scales(latent.detach().double(), granularity)
    logits = torch.stack([-((wide / scale - code) ** 2) / temperature for code in (-1, 0, 1)])
    minus, _, plus = logits.softmax(0)
    expected = scale * (plus - minus)
    expected.backward(upstream.double())
    found = soft_ternarize(latent, temperature, granularity, 5)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(latent.grad.double(), wide.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_a_learned_scale_has_its_true_gradient_times_the_factor_of_lsq(granularity):
    latent = torch.randn(6, 10, requires_grad=True)
    scale = (weight_scale(latent.detach(), granularity, 5) * 1.3).requires_grad_()
    upstream = torch.randn(6, 10)
    found = soft_ternarize(latent, 0.5, granularity, 5, scale)
    found.backward(upstream)
    w, s = (x.detach().double().requires_grad_() for x in (latent, scale))
    step = s.repeat_interleave(5, dim=1) if granularity == "block" else s
    p = torch.stack([-((w / step - code) ** 2) / 0.5 for code in (-1, 0, 1)]).softmax(0)
    expected = step * (p[2] - p[0])
    expected.backward(upstream.double())
    shared = 60 // scale.numel()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(latent.grad.double(), w.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scale.grad.double(), s.grad / shared**0.5, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_without_temperature_they_are_the_hard_codes(granularity):
    latent = torch.randn(64, 60)
    latent[3] = 0
    code, scale = ternarize(latent, granularity, 20)
    scale = scale.repeat_interleave(20, dim=1) if granularity == "block" else scale
    assert torch.equal(soft_ternarize(latent, 1e-7, granularity, 20), code * scale)


def test_the_temperatures_do_what_is_said_of_them():
    """Closed form over a grid of w / scale, weighted as Gaussian latents are: their scale is sqrt(2 / pi) sigma."""
    ratios = torch.linspace(-6, 6, 12_001).double()
    density = torch.exp(-(ratios**2) / math.pi)
    density /= density.sum()

    def soft(temperature):
        p = torch.stack([-((ratios - c) ** 2) / temperature for c in (-1, 0, 1)]).softmax(0)
        mean = p[2] - p[0]
        return mean, 2 / temperature * (p[2] + p[0] - mean**2)

    def rms(difference):
        return float((difference**2 * density).sum().sqrt())

    mean, slope = soft(SOFTEST)
    inner = slope[ratios.abs() <= 0.5]
    assert rms(mean - ratios.clamp(-1, 1)) == pytest.approx(0.04, abs=0.005)
    assert (inner.min().item(), inner.max().item()) == pytest.approx((0.85, 1.08), abs=0.01)
    assert soft(0.3)[1][ratios.abs() < 1e-6].item() == pytest.approx(0.44, abs=0.01)
    mean, slope = soft(HARDEST)
    hard = ratios.round().clamp(-1, 1)
    assert slope.max().item() == pytest.approx(1 / (2 * HARDEST), rel=0.01)
    assert rms(mean - hard) == pytest.approx(0.05, abs=0.005)
    for temperature in (0.5, 0.3, 0.1, 0.02):
        distance = float(((soft(temperature)[0] - hard).abs() * density).sum())
        assert distance == pytest.approx(0.4 * temperature, rel=0.25)


def test_the_temperature_falls_linearly_and_ends_with_the_warm_up():
    config = TrainingConfig(quant_warmup_ratio=0.5, quant_warmup_form="soft")
    found = [soft_temperature_at(config, step, 10) for step in range(10)]
    assert found[:5] == pytest.approx([SOFTEST + (HARDEST - SOFTEST) * step / 5 for step in range(5)])
    assert found[5:] == [0.0] * 5
    mixed = TrainingConfig(quant_warmup_ratio=0.5)
    assert {soft_temperature_at(mixed, step, 10) for step in range(10)} == {0.0}


def test_soft_weights_are_for_training_alone():
    linear, x = (
        BitLinear(12, 7, bias=True, spec=TernarySpec(activation_bits=16), norm_eps=None),
        torch.randn(4, 12),
    )
    hard = linear(x)
    linear.soft_temperature = 0.5
    soft = linear(x)
    torch.testing.assert_close(soft, x @ soft_ternarize(linear.weight, 0.5).T + linear.bias)
    assert not torch.allclose(soft, hard)
    assert torch.equal(linear.eval()(x), hard)
    linear.train().soft_temperature = 0.0
    assert torch.equal(linear(x), hard)


def test_the_first_step_is_the_models_own_with_soft_weights(make_model, tokenizer, tmp_path):
    """Activations are not quantised yet; Hugging Face's forward pass with the soft weights is the oracle."""
    student = refine(make_model("llama"), TernarySpec(norm_sites="none"))[0]
    settings = {"quant_warmup_ratio": 0.5, "log_every": 1, "batch_size": 32}
    train(student, tokenizer, tmp_path, steps=4, quant_warmup_form="soft", **settings)
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    dense = make_model("llama")
    with torch.no_grad():
        for name, weight in dense.named_parameters():
            if name.endswith("_proj.weight"):
                scale = weight.abs().mean()
                p = torch.stack([-((weight / scale - code) ** 2) / SOFTEST for code in (-1, 0, 1)]).softmax(0)
                weight.copy_(scale * (p[2] - p[0]))
        ids = torch.randint(2, 300, (32, 12), generator=torch.Generator().manual_seed(5))
        assert first["loss"] == pytest.approx(dense(ids, labels=ids).loss.item(), rel=1e-4)
    layers = [module for module in student.modules() if isinstance(module, BitLinear)]
    assert {(layer.soft_temperature, layer.quant_lambda) for layer in layers} == {(0.0, 1.0)}


def test_a_step_that_was_stopped_ends_with_the_same_weights(cli, project, student, tmp_path):
    """Eight steps, seven of them with soft codes; stopped after a checkpoint of the third and the fifth step."""
    settings = ("quant_warmup_ratio=0.8", "quant_warmup_form=soft", "save_every=3")
    changes = [word for setting in settings for word in ("--set", f"pretrain.{setting}")]

    def pretrain(name):
        return cli("pretrain", project, "--source", student, "--output", tmp_path / name, *changes)

    assert pretrain("whole").status == 0
    with stopped_at(5):
        assert pretrain("stopped").status == STOPPED
    assert pretrain("stopped").status == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert files[0] == files[1]


def test_a_record_names_the_form_only_where_it_is_another():
    assert "quant_warmup_form" not in training_settings(TrainingConfig(quant_warmup_ratio=0.5))
    soft = TrainingConfig(quant_warmup_ratio=0.5, quant_warmup_form="soft")
    assert training_settings(soft)["quant_warmup_form"] == "soft"


def test_the_plan_counts_the_slopes_that_are_kept(make_model):
    """Four bytes a ternary weight, and little else."""
    blueprint = Blueprint(config_text(make_model("llama").config), TernarySpec())
    step = TrainingStep(
        student=blueprint, batch_size=2, length=16, labelled=15, padded=False, bf16=False, accumulation=1
    )
    hard, soft = (step_memory(replace(step, soft=soft)) for soft in (False, True))
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert soft.activations - hard.activations == pytest.approx(4 * weights, rel=0.01)
