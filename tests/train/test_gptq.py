"""GPTQ against the paper's equations computed slowly, and the latents that hold its codes and scale."""

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from bitdistill.model import TernarySpec
from bitdistill.model.quant import ternarize, weight_scale
from bitdistill.train.gptq import gptq, with_absmean

ROWS, COLUMNS = 5, 300  # more columns than are updated together
DAMPING = 0.02
SPECS = {
    "tensor": TernarySpec(),
    "channel": TernarySpec(granularity="channel"),
    "block": TernarySpec(granularity="block", block_size=150),
    "small block": TernarySpec(granularity="block", block_size=40),
}
specs = pytest.mark.parametrize("name", SPECS)


def correlated(columns: int = COLUMNS, tokens: int = 400, seed: int = 0) -> torch.Tensor:
    """Inputs ``[K, n]`` whose channels differ in size and go together, as a network's do."""
    torch.manual_seed(seed)
    mixed = torch.randn(columns, columns // 4) @ torch.randn(columns // 4, tokens)
    return (mixed + torch.randn(columns, tokens)) * torch.logspace(-1, 1, columns)[
        torch.randperm(columns), None
    ]


def ternary(values: np.ndarray, scale: float | np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values.astype(np.float32) / np.float32(scale)), -1, 1).astype(np.float64)


def reference(
    weight: np.ndarray, hessian: np.ndarray, spec: TernarySpec, damping: float, order: list[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Optimal brain quantisation in a fixed order: eq. 2 spreads an error, eq. 3 takes the column out of the inverse.

    One row at a time, the whole inverse updated after every column. Returns the weights as they were rounded, and the
    quantised ones.
    """
    order = order or list(range(weight.shape[1]))
    damped = hessian + np.diag(damping * np.diag(hessian).mean() + (np.diag(hessian) == 0))
    latents, quantised = np.zeros_like(weight), np.zeros_like(weight)
    for row in range(len(weight)):
        rest, inverse, scale = weight[row].copy(), np.linalg.inv(damped), 0.0
        for column in order:
            if spec.granularity == "tensor":
                scale = np.abs(weight).mean()
            elif spec.granularity == "channel":
                scale = np.abs(weight[row]).mean()
            elif column % spec.block_size == 0:
                scale = np.abs(rest[column : column + spec.block_size]).mean()
            latents[row, column] = rest[column]
            quantised[row, column] = ternary(rest[column], scale) * scale
            error = (rest[column] - quantised[row, column]) / inverse[column, column]
            rest -= error * inverse[:, column]
            inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
            inverse[column, column] = 1.0  # never read again; keeps the rest of the loop plain
            inverse[column, :column] = inverse[column, column + 1 :] = 0.0
            inverse[:column, column] = inverse[column + 1 :, column] = 0.0
    return latents, quantised


def expanded(scale: torch.Tensor, spec: TernarySpec, columns: int = COLUMNS) -> torch.Tensor:
    if scale.shape[1] > 1:
        return scale.repeat_interleave(spec.block_size, dim=1)[:, :columns]
    return scale.expand(-1, columns)


@specs
def test_it_is_optimal_brain_quantisation_column_by_column(name):
    spec, inputs = SPECS[name], correlated()
    weight = torch.randn(ROWS, COLUMNS)
    gram = (inputs @ inputs.T).double()
    gram[7] = gram[:, 7] = 0  # an input that is always silent
    latent, codes, scale = gptq(weight, gram, spec, damping=DAMPING)
    # The factor 2 of the paper's Hessian and the scale of the inputs are nothing to the result.
    expected, quantised = reference(weight.double().numpy(), 2 * gram.numpy(), spec, DAMPING)
    np.testing.assert_allclose(latent.numpy(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose((codes * expanded(scale, spec)).numpy(), quantised, rtol=1e-5, atol=1e-7)
    assert (latent - weight).abs().max() > 0.1  # errors were fed back
    assert set(codes.unique().tolist()) == {-1.0, 0.0, 1.0}


def test_columns_can_come_in_the_order_of_their_inputs():
    spec, inputs = SPECS["channel"], correlated()
    weight, gram = torch.randn(ROWS, COLUMNS), (inputs @ inputs.T).double()
    order = gram.diagonal().argsort(descending=True).tolist()
    latent, codes, scale = gptq(weight, gram, spec, damping=DAMPING, act_order=True)
    expected, quantised = reference(weight.double().numpy(), gram.numpy(), spec, DAMPING, order)
    np.testing.assert_allclose(latent.numpy(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose((codes * expanded(scale, spec)).numpy(), quantised, rtol=1e-5, atol=1e-7)
    assert not torch.equal(codes, gptq(weight, gram, spec, damping=DAMPING)[1])


@specs
@pytest.mark.parametrize("seed", range(3))
def test_its_output_error_is_below_that_of_rounding_to_nearest(name, seed):
    spec, inputs = SPECS[name], correlated(seed=seed)
    weight = torch.randn(32, COLUMNS)

    def error(quantised: torch.Tensor) -> float:
        return float(((quantised - weight).double() @ inputs.double()).norm() / (weight @ inputs).norm())

    _, codes, scale = gptq(weight, (inputs @ inputs.T).double(), spec)
    nearest, absmean = ternarize(weight, spec.granularity, spec.block_size)
    assert error(codes * expanded(scale, spec)) < 0.9 * error(nearest * expanded(absmean, spec))


def test_a_hessian_of_too_few_tokens_needs_damping():
    inputs = correlated(tokens=20)
    gram = (inputs @ inputs.T).double()
    with pytest.raises(torch.linalg.LinAlgError):
        gptq(torch.randn(ROWS, COLUMNS), gram, SPECS["tensor"], damping=0.0)
    assert gptq(torch.randn(ROWS, COLUMNS), gram, SPECS["tensor"])[0].isfinite().all()


# --- the latents of a student ---


@specs
def test_with_a_learned_scale_the_latents_have_exactly_these_codes(name):
    spec, inputs = SPECS[name], correlated()
    latent, codes, scale = gptq(torch.randn(ROWS, COLUMNS), (inputs @ inputs.T).double(), spec)
    found, kept = ternarize(latent, spec.granularity, spec.block_size, scale=scale)
    assert torch.equal(found, codes)
    assert torch.equal(kept, scale)


@specs
def test_with_an_absmean_the_codes_are_these_and_the_scale_is_the_grids(name):
    spec, inputs = SPECS[name], correlated()
    latent, codes, scale = gptq(torch.randn(ROWS, COLUMNS), (inputs @ inputs.T).double(), spec)
    assert not torch.allclose(weight_scale(latent, spec.granularity, spec.block_size), scale, rtol=1e-3)
    moved = with_absmean(latent, codes, scale, spec)
    found, absmean = ternarize(moved, spec.granularity, spec.block_size)
    assert torch.equal(found, codes)
    torch.testing.assert_close(absmean, scale, rtol=1e-6, atol=0)
    assert ((moved * latent) >= 0).all()


def test_no_other_latents_with_these_codes_and_scale_are_nearer():
    """The nearest of a convex set: another solver finds the same. Cells as the docstring has them, margin aside."""
    torch.manual_seed(4)
    latent = torch.randn(1, 40)
    codes, scale = torch.where(latent.abs() > 0.6, latent.sign(), 0.0), torch.tensor([[0.9]])
    moved = with_absmean(latent, codes, scale, TernarySpec())
    magnitude, used = latent.abs().double().numpy()[0], codes.numpy()[0] != 0
    lower, upper = np.where(used, 0.45, 0), np.where(used, np.inf, 0.45)

    def mean(shift: float) -> float:
        return float(np.clip(magnitude + shift, lower, upper).mean())

    shift = brentq(lambda t: mean(t) - 0.9, -10, 10)
    expected = np.clip(magnitude + shift, lower, upper)
    np.testing.assert_allclose(moved.abs().numpy()[0], expected, atol=3e-3)
    # Variational inequality of a projection: no feasible point lies on the far side.
    rng = np.random.default_rng(0)
    for _ in range(50):
        other = np.clip(magnitude + rng.normal(size=40), lower + 1e-9, np.where(used, 9.0, 0.45))
        free = used & (other > 0.5)
        other[free] += (0.9 * 40 - other.sum()) / free.sum()
        if (other < lower).any():
            continue
        assert np.dot(magnitude - expected, other - expected) <= 1e-6


@pytest.mark.parametrize("name", ["channel", "small block"])
def test_a_scale_without_a_code_gets_latents_of_zero_which_multiply_as_before(name):
    spec = SPECS[name]
    latent, codes = torch.randn(ROWS, COLUMNS), torch.zeros(ROWS, COLUMNS)
    codes[1:] = latent[1:].sign()
    scale = torch.full_like(weight_scale(latent, spec.granularity, spec.block_size), 0.8)
    moved = with_absmean(latent, codes, scale, spec)
    assert not moved[0].any()
    found, absmean = ternarize(moved, spec.granularity, spec.block_size)
    torch.testing.assert_close(
        found * expanded(absmean, spec), codes * expanded(scale, spec), rtol=1e-6, atol=0
    )
