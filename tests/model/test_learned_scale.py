"""Learned scales: the start is the absmean student, gradients are LSQ's, and a scale cannot turn a sign."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bitdistill.errors import CheckpointError
from bitdistill.model import BitLinear, TernarySpec
from bitdistill.model.quant import EPS, fake_quantize_weight, ternarize
from bitdistill.train.loading import check_tensors, load_as
from bitdistill.train.size import model_size
from bitdistill.train.surgery import refine
from bitdistill.train.trainer import StudentTrainer

granularities = pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
ROWS, COLUMNS, BLOCK = 6, 13, 5  # the last block is shorter


def groups(granularity: str) -> list[tuple[int, int, tuple[slice, slice]]]:
    """Place of every scale, and the weights that share it."""
    if granularity == "tensor":
        return [(0, 0, (slice(None), slice(None)))]
    width = BLOCK if granularity == "block" else COLUMNS
    return [
        (row, index, (slice(row, row + 1), slice(start, min(start + width, COLUMNS))))
        for row in range(ROWS)
        for index, start in enumerate(range(0, COLUMNS, width))
    ]


def made(granularity: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, scales that are no absmean, and a gradient from above."""
    latent = torch.randn(ROWS, COLUMNS)
    places = groups(granularity)
    shape = max(row for row, _, _ in places) + 1, max(index for _, index, _ in places) + 1
    return latent, torch.empty(shape).uniform_(0.4, 1.6), torch.randn(ROWS, COLUMNS)


@granularities
def test_gradients_are_the_differences_of_the_surrogate_that_lsq_rounds_with(granularity):
    """LSQ takes rounding for the addition of a constant: s (clip(v / s, -1, 1) + what rounding added)."""
    latent, scale, upstream = made(granularity)
    latent.requires_grad_()
    scale.requires_grad_()
    fake_quantize_weight(latent, granularity, BLOCK, 1.0, "divide", scale).backward(upstream)
    wide, above = latent.detach().double().numpy(), upstream.double().numpy()
    assert latent.grad is not None
    assert scale.grad is not None
    seen = 0
    for row, index, place in groups(granularity):
        v, s, g = wide[place], float(scale[row, index].detach().double()), above[place]
        clipped = np.clip(v / s, -1, 1)
        rounding = np.round(clipped) - clipped

        def loss(v, s, rounding=rounding, g=g):
            return g * s * (np.clip(v / s, -1, 1) + rounding)

        step = 1e-6
        of_latent = (loss(v + step, s) - loss(v - step, s)) / (2 * step)
        of_scale = ((loss(v, s + step) - loss(v, s - step)) / (2 * step)).sum() / math.sqrt(v.size)
        np.testing.assert_allclose(latent.grad[place].numpy(), of_latent, rtol=1e-5, atol=1e-6)
        assert scale.grad[row, index].item() == pytest.approx(of_scale, rel=1e-4, abs=1e-6)
        seen += v.size
    assert seen == ROWS * COLUMNS
    clipped_share = (latent.grad == 0).float().mean()
    assert 0.1 < clipped_share < 0.9  # both branches were there


@granularities
def test_the_forward_pass_is_code_times_scale(granularity):
    latent, scale, _ = made(granularity)
    quantised = fake_quantize_weight(latent, granularity, BLOCK, 1.0, "divide", scale)
    for row, index, place in groups(granularity):
        s = scale[row, index].item()
        expected = np.clip(np.rint(latent[place].numpy() / np.float32(s)), -1, 1) * np.float32(s)
        np.testing.assert_array_equal(quantised[place].numpy(), expected)


def test_the_warm_up_coefficient_mixes_the_gradients_too():
    latent, scale, upstream = made("channel")
    grads = {}
    for quant_lambda in (0.0, 0.25, 1.0):
        leaves = latent.clone().requires_grad_(), scale.clone().requires_grad_()
        fake_quantize_weight(leaves[0], "channel", BLOCK, quant_lambda, "divide", leaves[1]).backward(
            upstream
        )
        grads[quant_lambda] = [leaf.grad for leaf in leaves]
    assert torch.equal(grads[0.0][0], upstream)
    assert not grads[0.0][1].any()
    torch.testing.assert_close(grads[0.25][0], 0.75 * upstream + 0.25 * grads[1.0][0])
    torch.testing.assert_close(grads[0.25][1], 0.25 * grads[1.0][1])


@pytest.mark.parametrize("value", [0.0, -0.3])
def test_a_scale_that_was_moved_past_zero_turns_no_sign_and_can_come_back(value):
    latent, upstream = torch.randn(4, 9), torch.randn(4, 9)
    scale = torch.full((1, 1), value, requires_grad=True)
    quantised = fake_quantize_weight(latent, "tensor", 9, 1.0, "divide", scale)
    torch.testing.assert_close(quantised, latent.sign() * EPS)
    assert ternarize(latent, scale=scale)[1].item() == pytest.approx(EPS)
    quantised.backward(upstream)
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx((upstream * latent.sign()).sum().item() / 6, rel=1e-5)


@granularities
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_a_fresh_student_is_the_absmean_student_bit_for_bit(make_model, family, granularity):
    model, ids = make_model(family), torch.randint(2, 300, (2, 7))
    spec = {"granularity": granularity, "block_size": 20}
    absmean, _ = refine(model, TernarySpec(**spec))
    learned, report = refine(model, TernarySpec(scale="learned", **spec))
    with torch.no_grad():
        assert torch.equal(learned(ids).logits, absmean(ids).logits)
    scales = [p for name, p in learned.named_parameters() if name.endswith(".weight_scale")]
    assert len(scales) == 14
    assert all(scale.dtype == torch.float32 and scale.requires_grad for scale in scales)
    # The same file on disk: a scale is there in either form.
    assert report.after.bytes == model_size(absmean).bytes
    assert report.after.parameters == model_size(absmean).parameters + sum(s.numel() for s in scales)


def test_scales_have_no_weight_decay_and_matrices_have(make_student):
    student = make_student("qwen3", {"scale": "learned"})
    names = StudentTrainer.get_decay_parameter_names(object.__new__(StudentTrainer), student)
    assert "model.layers.0.mlp.up_proj.weight" in names
    assert not [name for name in names if "scale" in name or "norm" in name]


def test_a_checkpoint_without_its_scales_is_refused_and_by_transformers_alone_starts_at_absmean(
    make_student, tmp_path
):
    student = make_student("llama", {"scale": "learned"})
    state = {name: value for name, value in student.state_dict().items() if not name.endswith("_scale")}
    student.save_pretrained(tmp_path, state_dict=state)
    model, report = load_as(AutoModelForCausalLM, tmp_path, None)
    for module in model.modules():
        if isinstance(module, BitLinear):
            assert module.weight_scale.item() == pytest.approx(module.weight.abs().mean().item(), rel=1e-5)
    with pytest.raises(CheckpointError, match=r"lacks model.layers.0.*weight_scale"):
        check_tensors(tmp_path, model, report)


def test_huggingfaces_bitnet_has_no_learned_scale():
    with pytest.raises(ValueError, match=r"ternary\.scale = 'learned'.*use scale = 'absmean'"):
        TernarySpec(scale="learned", rounding="multiply")
