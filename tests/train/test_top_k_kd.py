"""The KL over the k likeliest tokens and the rest, against closed forms in float64."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp
from torch import Tensor

from bitdistill.train.losses import logits_kd, top_k_kd, top_k_log_p

TOKENS, VOCABULARY = 5, 12
temperatures = pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0])


def logits(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(TOKENS, VOCABULARY, generator=generator, dtype=torch.float64)).to(dtype)


def top_k(teacher: Tensor, k: int, temperature: float) -> dict:
    top, log_p, rest = top_k_log_p(teacher, k, temperature=temperature)
    return {"top_NK": top, "top_log_p_NK": log_p, "rest_log_p_N": rest, "temperature": temperature}


@temperatures
@pytest.mark.parametrize("k", [1, 3, 10])
def test_it_is_the_divergence_of_the_merged_distributions(k, temperature):
    student, teacher = logits(1), logits(2)
    expected = 0.0
    for row_s, row_t in zip(student.numpy(), teacher.numpy(), strict=True):
        log_q, log_p = (log_softmax(row / temperature) for row in (row_s, row_t))
        order = np.argsort(-row_t)
        merged = [np.append(x[order[:k]], logsumexp(x[order[k:]])) for x in (log_p, log_q)]
        expected += float((np.exp(merged[0]) * (merged[0] - merged[1])).sum())
    found = top_k_kd(student, **top_k(teacher, k, temperature))
    assert found.item() == pytest.approx(expected, rel=1e-12)
    assert 0 < expected < logits_kd(student, teacher, temperature=temperature).item()


@temperatures
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_with_the_whole_vocabulary_it_is_the_full_divergence(temperature, dtype):
    student, teacher = logits(1, dtype).requires_grad_(), logits(2, dtype)
    full = logits_kd(student, teacher, temperature=temperature)
    found = top_k_kd(student, **top_k(teacher, VOCABULARY, temperature))
    torch.testing.assert_close(found, full)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (found, full)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 1e-3


def test_its_gradient_is_right():
    rows = top_k(logits(2), 4, 2.0)
    assert torch.autograd.gradcheck(lambda x: top_k_kd(x, **rows), logits(1).requires_grad_())


def test_masked_tokens_count_for_nothing():
    student, teacher = logits(1).requires_grad_(), logits(2)
    mask = torch.tensor([True, False, True, True, False])
    rows = top_k(teacher, 4, 2.0)
    found = top_k_kd(student, **rows, mask_N=mask)
    kept = {name: x[mask] if isinstance(x, Tensor) else x for name, x in rows.items()}
    expected = top_k_kd(student[mask], **kept)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_a_student_that_says_the_same_of_the_top_costs_nothing_whatever_it_says_of_the_rest():
    teacher = logits(2)
    rows = top_k(teacher, 4, 2.0)
    student = teacher.clone()
    for row, top in zip(student, rows["top_NK"], strict=True):
        rest = torch.ones(VOCABULARY, dtype=torch.bool)
        rest[top] = False
        row[rest] = row[rest].flip(0)
    assert not torch.equal(student, teacher)
    assert top_k_kd(student, **rows).item() == pytest.approx(0, abs=1e-12)


def test_a_rest_without_mass_gives_finite_loss_and_gradient():
    teacher, student = logits(2, torch.float32), logits(1, torch.float32)
    teacher[:, 3:] -= 1e4
    student[:, 3:] -= 1e4
    student.requires_grad_()
    loss = top_k_kd(student, **top_k(teacher, 3, 1.0))
    full = logits_kd(student, teacher, temperature=1.0)
    torch.testing.assert_close(loss, full)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.isfinite().all()


def test_rounded_rows_stay_a_distribution():
    """So that the loss keeps its sign; with a distribution rounded to half a digit too."""
    teacher = logits(2, torch.float32)
    rows = top_k(teacher, 4, 1.0)
    rows["top_log_p_NK"] = (rows["top_log_p_NK"] * 4).round() / 4
    assert top_k_kd(teacher, **rows).item() > 0
