"""SpinQuant: Cayley steps against the closed form, and rotations that lower the quantised loss on their text."""

import numpy as np
import pytest
import torch
from tiny_families import small_student
from torch import nn

from bitdistill.errors import TrainingError
from bitdistill.train.rotation import rotate
from bitdistill.train.spinquant import CayleySGD, learn_rotations


def orthonormal(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    if torch.linalg.det(q) < 0:
        q[:, 0] *= -1
    return q


def test_steps_are_those_of_the_published_algorithm_in_closed_form():
    x = nn.Parameter(orthonormal(6, 0))
    expected, momentum = x.detach().numpy().copy(), np.zeros((6, 6))
    optimizer = CayleySGD([x], lr=0.05, momentum=0.9)
    for seed in range(3):
        gradient = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        x.grad = gradient.clone()
        optimizer.step()
        momentum = 0.9 * momentum - gradient.numpy()
        u = momentum @ expected.T - expected @ (expected.T @ momentum @ expected.T) / 2
        w = u - u.T
        size = min(0.05, 1 / (np.abs(w).sum(axis=0).max() + 1e-8))
        eye = np.eye(6)
        momentum = w @ expected
        expected = np.linalg.inv(eye - size / 2 * w) @ (eye + size / 2 * w) @ expected
        np.testing.assert_allclose(x.detach().numpy(), expected, atol=1e-12)


def test_it_finds_the_rotation_between_two_clouds_and_stays_orthonormal():
    cloud = torch.randn(200, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    wanted = orthonormal(8, 1)
    x = nn.Parameter(torch.eye(8, dtype=torch.float64))
    optimizer = CayleySGD([x], lr=0.2)
    for _ in range(300):
        optimizer.zero_grad()
        ((cloud @ x - cloud @ wanted) ** 2).sum(dim=1).mean().backward()
        optimizer.step()
        torch.testing.assert_close(x.T @ x, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(x.detach(), wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("fused", [True, False])
def test_learning_moves_rotations_alone_and_fused_lowers_the_quantised_loss_on_its_text(fused):
    model = small_student("llama")
    rotated, rotations, _ = rotate(model, kind="spinquant", fused=fused)
    weights = {name: p.clone() for name, p in rotated.named_parameters()}
    starts = [matrix.detach().clone() for matrix in rotations.parameters()]
    ids = torch.randint(2, 300, (4, 16))
    losses = learn_rotations(rotated, rotations, [{"input_ids": ids}], steps=30)
    with torch.no_grad():
        logits = rotated(ids).logits[:, :-1]
        after = float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
    # Not fused, the matrices decide about the errors of quantisers alone, which random weights have no use for.
    assert not fused or after < losses[0] - 0.02
    for matrix, start in zip(rotations.parameters(), starts, strict=True):
        assert (matrix - start).abs().max() > 1e-3
    for matrix in rotations.parameters():
        torch.testing.assert_close(matrix.T @ matrix, torch.eye(len(matrix)), rtol=0, atol=1e-4)
    assert all(torch.equal(p, weights[name]) for name, p in rotated.named_parameters())


def test_without_text_there_is_an_error():
    rotated, rotations, _ = rotate(small_student("llama"), kind="spinquant", fused=True)
    with pytest.raises(TrainingError, match="give text"):
        learn_rotations(rotated, rotations, [])
