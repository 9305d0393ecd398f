"""Losses of logits against float64 references: scipy for the divergences, gradcheck for every gradient, and sums that
do not depend on how a batch is split. Those of relations: ``test_relation_kd.py``.
"""

import math

import numpy as np
import pytest
import torch
from parts import SPLITS, assert_splits_add_up, normal
from scipy.special import log_softmax, rel_entr, softmax
from torch import Tensor
from torch.nn import functional as F

from bitdistill.train import head_loss
from bitdistill.train.losses import cross_entropy, logits_kd, shifted_labels

IGNORE_INDEX = -100  # the Hugging Face convention for labels that are not to be predicted
FORMS = ("scaled_dot", "cosine")
forms = pytest.mark.parametrize("form", FORMS)


# --- labels and cross-entropy ---


def test_labels_shift_to_the_position_that_predicts_them():
    labels = torch.tensor([[5, 6, 7, 8], [IGNORE_INDEX, IGNORE_INDEX, 3, IGNORE_INDEX]])
    assert shifted_labels(labels).tolist() == [
        [6, 7, 8, IGNORE_INDEX],
        [IGNORE_INDEX, 3, IGNORE_INDEX, IGNORE_INDEX],
    ]


def test_cross_entropy_is_the_sum_that_torch_gives_on_whole_logits():
    hidden, labels = normal(700, 6, dtype=torch.float32), torch.arange(700) % 11
    head = torch.nn.Linear(6, 11)
    whole = F.cross_entropy(head(hidden), labels, reduction="sum")
    torch.testing.assert_close(cross_entropy(hidden, head, labels), whole)


def test_cross_entropy_follows_the_float64_reference():
    hidden, labels = normal(300, 6), torch.arange(300) % 11
    head = torch.nn.Linear(6, 11).double()
    logits = hidden.numpy() @ head.weight.detach().numpy().T + head.bias.detach().numpy()
    expected = -log_softmax(logits, axis=-1)[np.arange(300), labels.numpy()].sum()
    assert cross_entropy(hidden, head, labels).item() == pytest.approx(expected, rel=1e-12)


def test_cross_entropy_of_equal_logits_is_log_vocabulary_per_token():
    head = torch.nn.Linear(6, 11).double()
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.constant_(head.bias, 3.0)
    loss = cross_entropy(normal(5, 6), head, torch.arange(5))
    assert loss.item() == pytest.approx(5 * math.log(11), rel=1e-12)


def test_cross_entropy_skips_ignored_labels():
    hidden, labels = normal(20, 6), torch.arange(20) % 11
    head = torch.nn.Linear(6, 11).double()
    some = labels.clone()
    some[::3] = IGNORE_INDEX
    chosen = some != IGNORE_INDEX
    expected = cross_entropy(hidden[chosen], head, labels[chosen])
    torch.testing.assert_close(cross_entropy(hidden, head, some), expected)


def test_cross_entropy_never_makes_the_logits_of_more_than_a_block():
    sizes = []

    def head(hidden: Tensor) -> Tensor:
        sizes.append(len(hidden))
        return hidden

    tokens = head_loss.BLOCK_TOKENS * 2 + 3
    cross_entropy(normal(tokens, 4), head, torch.zeros(tokens, dtype=torch.int64))
    assert sizes == [head_loss.BLOCK_TOKENS, head_loss.BLOCK_TOKENS, 3]


def test_cross_entropy_of_no_tokens_is_zero_and_has_a_gradient():
    hidden = torch.zeros(0, 6, requires_grad=True)
    head = torch.nn.Linear(6, 11)
    loss = cross_entropy(hidden, head, torch.zeros(0, dtype=torch.int64))
    assert loss.item() == 0.0
    loss.backward()
    assert not head.weight.grad.any()


def test_cross_entropy_of_bf16_is_summed_in_fp32():
    hidden, labels = normal(600, 6, dtype=torch.bfloat16), torch.arange(600) % 11
    head = torch.nn.Linear(6, 11).bfloat16()
    loss = cross_entropy(hidden, head, labels)
    logits = head(hidden).detach().double().numpy()
    expected = -log_softmax(logits, axis=-1)[np.arange(600), labels.numpy()].sum()
    assert loss.dtype == torch.float32
    # A bf16 sum near 1500 would be off by up to 4.
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_cross_entropy_gradient_passes_gradcheck(monkeypatch):
    monkeypatch.setattr(head_loss, "BLOCK_TOKENS", 3)
    labels = torch.arange(7) % 5

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return cross_entropy(hidden, lambda h: h @ weight.T, labels)  # type: ignore[arg-type]

    leaves = (normal(7, 4).requires_grad_(), normal(5, 4, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(loss, leaves)


# --- logits KD ---


@pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0])
def test_logits_kd_is_the_divergence_of_student_from_teacher(temperature):
    student, teacher = normal(9, 13) * 3, normal(9, 13, seed=1) * 3
    p = softmax(teacher.numpy() / temperature, axis=-1)
    q = softmax(student.numpy() / temperature, axis=-1)
    expected = rel_entr(p, q).sum()
    loss = logits_kd(student, teacher, temperature=temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    # The other direction is another number, so the order of arguments is tested too.
    assert rel_entr(q, p).sum() != pytest.approx(expected, rel=1e-2)


def test_logits_kd_of_equal_distributions_is_zero():
    logits = normal(9, 13)
    assert logits_kd(logits, logits.clone(), temperature=5.0).item() == 0.0
    # Softmax does not see a constant added to a token's logits.
    assert logits_kd(logits + 7.0, logits, temperature=5.0).item() == pytest.approx(0.0, abs=1e-12)


def test_logits_kd_has_no_temperature_squared():
    # For small logits KL ~ variance of the difference / (2 tau^2): doubling tau divides it by four.
    student, teacher = normal(9, 13) * 1e-3, normal(9, 13, seed=1) * 1e-3
    cold = logits_kd(student, teacher, temperature=1.0).item()
    assert logits_kd(student, teacher, temperature=2.0).item() == pytest.approx(cold / 4, rel=1e-2)


def test_logits_kd_of_bf16_is_computed_in_fp32():
    student, teacher = (normal(50, 300, seed=s, dtype=torch.bfloat16) for s in (0, 1))
    loss = logits_kd(student, teacher, temperature=5.0)
    expected = logits_kd(student.double(), teacher.double(), temperature=5.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_logits_kd_gradient_passes_gradcheck():
    teacher = normal(4, 6, seed=1)
    assert torch.autograd.gradcheck(
        lambda s: logits_kd(s, teacher, temperature=2.0), normal(4, 6).requires_grad_()
    )


# --- accumulation: the sum over a batch is the sum of the sums over its parts ---


@SPLITS
def test_cross_entropy_adds_up_over_micro_batches(sizes):
    hidden, weight = normal(4, 5, 6).requires_grad_(), normal(11, 6, seed=1).requires_grad_()
    labels = torch.arange(20).reshape(4, 5) % 11
    labels[1, 2:] = IGNORE_INDEX

    def loss(h: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(h.flatten(0, 1), lambda x: x @ weight.T, y.flatten())  # type: ignore[arg-type]

    parts = [loss(h, y) for h, y in zip(hidden.split(sizes), labels.split(sizes), strict=True)]
    assert_splits_add_up(loss(hidden, labels), parts, [hidden, weight])


@SPLITS
def test_logits_kd_adds_up_over_micro_batches(sizes):
    student, teacher = normal(4, 13).requires_grad_(), normal(4, 13, seed=1)
    parts = [
        logits_kd(s, t, temperature=5.0)
        for s, t in zip(student.split(sizes), teacher.split(sizes), strict=True)
    ]
    assert_splits_add_up(logits_kd(student, teacher, temperature=5.0), parts, [student])
