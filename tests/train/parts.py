"""What the tests of the losses share: numbers to feed them, and that a sum over a batch is the sum over its parts."""

import pytest
import torch
from torch import Tensor

SPLITS = pytest.mark.parametrize("sizes", [[4], [1, 3], [2, 2], [1, 1, 1, 1]])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_splits_add_up(whole: Tensor, parts: list[Tensor], leaves: list[Tensor]) -> None:
    gradients = torch.autograd.grad(whole, leaves, retain_graph=True)
    total = torch.stack(parts).sum()
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-12)
    for gradient, expected in zip(torch.autograd.grad(total, leaves), gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
        assert expected.any()
