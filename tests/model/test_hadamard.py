"""The Hadamard transform against scipy's matrix, a sum written out in float64, and numpy's butterflies to the bit."""

import numpy as np
import pytest
import scipy.linalg
import torch

from bitdistill.model.hadamard import default_block, hadamard_transform, resolve_block


def dense(dim: int, block: int) -> np.ndarray:
    """The block-diagonal orthonormal matrix, from scipy."""
    one = scipy.linalg.hadamard(block).astype(np.float64) / np.sqrt(block)
    return scipy.linalg.block_diag(*[one] * (dim // block))


@pytest.mark.parametrize(
    ("dim", "block"), [(1, 1), (2, 2), (8, 8), (24, 8), (24, 2), (24, 1), (96, 32), (256, 256)]
)
def test_is_the_dense_matrix(dim: int, block: int) -> None:
    x = torch.randn(3, 5, dim, dtype=torch.float64)
    expected = x.numpy() @ dense(dim, block).T
    np.testing.assert_allclose(hadamard_transform(x, block).numpy(), expected, atol=1e-12)


def test_fp32_is_numpys_butterflies_to_the_bit() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((7, 192)).astype(np.float32) * 10 ** rng.uniform(-3, 3, (7, 192)).astype(
        np.float32
    )
    expected = x.copy()
    half = 1
    while half < 64:
        for start in range(0, 192, 2 * half):
            for i in range(start, start + half):
                low, high = expected[:, i].copy(), expected[:, i + half].copy()
                expected[:, i], expected[:, i + half] = low + high, low - high
        half *= 2
    expected *= np.float32(1 / np.sqrt(64))
    assert expected.dtype == np.float32
    np.testing.assert_array_equal(hadamard_transform(torch.from_numpy(x), 64).numpy(), expected)


def test_low_precision_is_transformed_in_fp32() -> None:
    x = torch.randn(4, 32).bfloat16()
    y = hadamard_transform(x, 32)
    assert y.dtype == torch.float32
    np.testing.assert_allclose(y.numpy(), x.double().numpy() @ dense(32, 32), atol=1e-5)


def test_gradient_is_the_transform() -> None:
    x = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: hadamard_transform(x, 4), x)
    assert torch.autograd.gradgradcheck(lambda x: hadamard_transform(x, 4), x)
    upstream = torch.randn(2, 12, dtype=torch.float64)
    (hadamard_transform(x, 4) * upstream).sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), upstream.numpy() @ dense(12, 4), atol=1e-12)


def test_input_is_left_alone_whatever_its_strides() -> None:
    base = torch.randn(16, 6)
    x, before = base.T, base.clone()
    np.testing.assert_allclose(
        hadamard_transform(x, 16).numpy(), before.T.double().numpy() @ dense(16, 16), atol=1e-5
    )
    assert torch.equal(base, before)


def test_gradient_reaches_bf16_in_its_dtype() -> None:
    x = torch.randn(3, 8).bfloat16().requires_grad_()
    hadamard_transform(x, 8).sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(("dim", "block"), [(3072, 1024), (9728, 512), (6912, 256), (2048, 2048), (7, 1)])
def test_default_block(dim: int, block: int) -> None:
    assert default_block(dim) == block == resolve_block(dim)


@pytest.mark.parametrize("block", [3, 12, -4])
def test_only_powers_of_two(block: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        resolve_block(24, block)
    with pytest.raises(ValueError, match="power of two"):
        hadamard_transform(torch.zeros(24), block)


def test_a_block_that_does_not_divide_names_the_dimension() -> None:
    with pytest.raises(ValueError, match=r"16 does not divide down_proj, which has 24 .* use 8"):
        resolve_block(24, 16, "down_proj")
    with pytest.raises(ValueError, match="does not divide"):
        hadamard_transform(torch.zeros(2, 24), 16)


def test_zero_is_no_block_of_a_transform() -> None:
    with pytest.raises(ValueError, match="power of two"):
        hadamard_transform(torch.zeros(8), 0)
