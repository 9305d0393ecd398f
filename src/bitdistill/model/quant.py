"""Quantisers of the BitNet papers as pure tensor functions.

Three states of a weight have three words: *latent* (the float the optimizer moves), *code* (-1, 0, +1)
and *packed* (bytes; not here). Scales multiply: ``x ~= code * scale``. Scales and codes are computed in
fp32 whatever the input dtype, because a mean over millions of bf16 magnitudes is not a mean.

absmean weights   (b1.58, eq. 1-3)  scale = mean|W|,     code = clip(round(W / scale), -1, 1)
absmax INT8       (b1.58, eq. 4)    scale = max|x| / 127, code = clip(round(x / scale), -128, 127)
absmean INT4      (BitNet v2, eq. 5) scale = mean|x| / sqrt(7), code = clip(round(x / scale), -8, 7)
attention states  (BitNet v2)       step = max|x| / (2^(b-1) - 1), code = clip(round(x / step) + 2^(b-1), 0, 2^b - 1)

learned weights   (LSQ, arXiv 1902.08153) scale is a parameter, code as above; gradients of eq. 3 and 5

Operations are in place where their operand is fresh: on large tensors fresh memory costs more than arithmetic.

``round`` is to nearest, ties to even: a weight of exactly half the scale becomes 0. The codes above are those of
``rounding = "divide"``. ``"multiply"`` is Hugging Face's BitNet to the last bit: round(x * (1 / scale)), with the
reciprocal rounded first; the two differ in ties only.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Granularity = Literal["tensor", "channel", "block"]
Rounding = Literal["divide", "multiply"]
ScaleRule = Literal["absmean", "learned"]

# Floor of mean|W| and max|x|. The papers add an unstated epsilon; every public implementation clamps at
# 1e-5, and an all-zero row must give zero codes rather than NaN. A learned scale has the same floor.
EPS = 1e-5


def scale_shape(rows: int, columns: int, granularity: Granularity, block_size: int) -> tuple[int, int]:
    """Shape of the scale of a ``[rows, columns]`` matrix: one for the tensor, each row, or each block of a row."""
    if granularity == "tensor":
        return 1, 1
    return rows, math.ceil(columns / block_size) if granularity == "block" else 1


def weight_scale(latent: Tensor, granularity: Granularity = "tensor", block_size: int = 128) -> Tensor:
    """Absmean scale of a weight matrix, in fp32.

    Args:
        latent: ``[N, K]`` (out_features, in_features), any float dtype.
        granularity: one scale for the tensor, for each output channel, or for each run of
            ``block_size`` consecutive input features of a row. A last, shorter block has the mean of
            what it holds.

    Returns:
        ``[1, 1]`` for ``tensor``, ``[N, 1]`` for ``channel``, ``[N, ceil(K / block_size)]`` for ``block``.
    """
    magnitude = latent.float().abs()
    if granularity == "tensor":
        return magnitude.mean().clamp(min=EPS).reshape(1, 1)
    if granularity == "channel":
        return magnitude.mean(dim=1, keepdim=True).clamp(min=EPS)
    if granularity == "block":
        sums, sizes = _block_sums(magnitude, block_size)
        return (sums / sizes).clamp(min=EPS)
    raise ValueError(f"granularity {granularity!r} is not one of tensor, channel, block")


def _block_sums(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Sums ``[N, blocks]`` of ``x`` ``[N, K]`` over the blocks of a row, and the features ``[blocks]`` in each."""
    rows, columns = x.shape
    blocks = math.ceil(columns / block_size)
    padded = F.pad(x, (0, blocks * block_size - columns))
    sizes = torch.full((blocks,), float(block_size), device=x.device)
    sizes[-1] = columns - (blocks - 1) * block_size
    return padded.view(rows, blocks, block_size).sum(dim=2), sizes


def expand_scale(scale: Tensor, in_features: int, block_size: int) -> Tensor:
    """Broadcast a weight scale so that it multiplies a ``[N, K]`` code matrix elementwise."""
    if scale.shape[1] == 1:
        return scale
    return scale.repeat_interleave(block_size, dim=1)[:, :in_features]


def ternarize(
    latent: Tensor,
    granularity: Granularity = "tensor",
    block_size: int = 128,
    rounding: Rounding = "divide",
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Ternary codes of a weight matrix (b1.58, eq. 1-3).

    Args:
        scale: a learned one, shaped as ``weight_scale`` shapes it, in place of the absmean; raised to the floor EPS
            where it is below, so that a scale that training moved past zero flips no sign.

    Returns:
        code ``[N, K]`` fp32 holding -1, 0 or +1, and the scale, fp32.
    """
    scale = weight_scale(latent, granularity, block_size) if scale is None else scale.float().clamp(min=EPS)
    if rounding == "multiply":
        factor = 1.0 / scale
        code = (latent.float() * expand_scale(factor, latent.shape[1], block_size)).round_().clamp_(-1, 1)
        return code, 1.0 / factor
    code = (latent.float() / expand_scale(scale, latent.shape[1], block_size)).round_().clamp_(-1, 1)
    return code, scale


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Absmax INT8 codes per token, that is per row of the last axis (b1.58, eq. 4).

    Returns:
        code, shaped like ``x``, fp32 integers in [-127, 127] (-128 is in the clip range but absmax
        never reaches it), and scale ``[..., 1]``.
    """
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=EPS) / 127
    return (x / scale).round_().clamp_(-128, 127), scale


def quantize_int4(x: Tensor) -> tuple[Tensor, Tensor]:
    """Absmean INT4 codes per token (BitNet v2, eq. 5); fp32 integers in [-8, 7] and scale ``[..., 1]``."""
    x = x.float()
    scale = x.abs().mean(dim=-1, keepdim=True).clamp(min=EPS) / math.sqrt(7)
    return (x / scale).round_().clamp_(-8, 7), scale


def quantize_state(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Unsigned absmax codes of queries, keys or values ``[..., head_dim]``, per token and head (BitNet v2).

    Returns:
        code, shaped like ``x``, fp32 integers in [1, 2^bits - 1] (0 is in the clip range but absmax never reaches it),
        and step ``[..., 1]``, 1 where a head is all zero: ``x ~= (code - 2^(bits-1)) * step``.
    """
    x = x.float()
    zero = 2 ** (bits - 1)
    step = x.abs().amax(dim=-1, keepdim=True) / (zero - 1)
    step = torch.where(step == 0, 1.0, step)
    return (x / step).round_().add_(zero).clamp_(0, 2 * zero - 1), step


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor) -> Tensor:  # noqa: ARG004
        return quantized

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grad, None


def straight_through(x: Tensor, quantized: Tensor) -> Tensor:
    """``quantized`` in the forward pass, bit for bit; the identity for ``x`` in the backward pass.

    The usual ``x + (quantized - x).detach()`` has the same gradient but rounds: its forward value is not
    exactly ``code * scale``, so what is trained would not be what is exported.
    """
    return _StraightThrough.apply(x, quantized)  # type: ignore[no-any-return]


class _LearnedStep(torch.autograd.Function):
    """LSQ's quantiser with Q_N = Q_P = 1 (arXiv 1902.08153): eq. 1-2 forward, eq. 3 and 5 backward.

    The gradient of a scale is multiplied by ``1 / sqrt(weights that share it x Q_P)`` (section 2.2), which clipping by
    global norm sees; AdamW alone is indifferent to it. The floor of the scale lets the gradient pass, so that a
    scale below it can come back.
    """

    @staticmethod
    def forward(ctx: Any, latent: Tensor, scale: Tensor, block_size: int) -> Tensor:
        ctx.save_for_backward(latent, scale)
        ctx.block_size = block_size
        code, step = ternarize(latent, block_size=block_size, scale=scale)
        return code.mul_(expand_scale(step, latent.shape[1], block_size)).to(latent.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        latent, scale = ctx.saved_tensors
        step = expand_scale(scale.float().clamp(min=EPS), latent.shape[1], ctx.block_size)
        ratio = latent.float() / step
        is_inside = ratio.abs() < 1
        of_scale = grad.float() * torch.where(is_inside, ratio.round() - ratio, ratio.sign())
        if scale.shape[1] > 1:
            sums, sizes = _block_sums(of_scale, ctx.block_size)
        else:
            sums = of_scale.sum().reshape(1, 1) if scale.shape[0] == 1 else of_scale.sum(dim=1, keepdim=True)
            sizes = torch.full((1,), latent.numel() / scale.numel(), device=latent.device)
        return grad * is_inside, (sums / sizes.sqrt()).to(scale.dtype), None


def fake_quantize_weight(
    latent: Tensor,
    granularity: Granularity = "tensor",
    block_size: int = 128,
    quant_lambda: float = 1.0,
    rounding: Rounding = "divide",
    scale: Tensor | None = None,
) -> Tensor:
    """``code * scale`` of a latent weight ``[N, K]`` in the latent's dtype: straight-through, or LSQ.

    ``quant_lambda`` below 1 mixes, ``(1 - lambda) * W + lambda * code * scale``: the warm-up of the
    Hugging Face 1.58-bit recipe. At 1 the result is exactly ``code * scale``. A learned ``scale`` gets the gradient
    of LSQ, and so do the latents, none where they are clipped.
    """
    if scale is not None:
        learned = _LearnedStep.apply(latent, scale, block_size)
        return learned if quant_lambda == 1.0 else torch.lerp(latent, learned, quant_lambda)
    with torch.no_grad():
        code, scale = ternarize(latent, granularity, block_size, rounding)
        quantized = code.mul_(expand_scale(scale, latent.shape[1], block_size)).to(latent.dtype)
        if quant_lambda != 1.0:
            quantized = torch.lerp(latent, quantized, quant_lambda)
    return straight_through(latent, quantized)


def dead_zone_bias(latent: Tensor, code: Tensor, weight: float) -> Tensor:
    """The bias ``[N]`` that the dead weights of a latent ``[N, K]`` make (Tequila, arXiv 2509.23809), fp32 at least.

        C_n = weight * sum over k with code_nk = 0 of w_nk

    Codes ``[N, K]`` are constants: the gradient reaches the dead weights alone, which pull at it together.
    """
    wide = latent.to(torch.promote_types(latent.dtype, torch.float32))
    return weight * torch.where(code == 0, wide, 0.0).sum(dim=1)


class _SoftCodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ratio: Tensor, temperature: float) -> Tensor:
        codes = torch.tensor([-1.0, 0.0, 1.0], device=ratio.device)
        minus, _, plus = (-((ratio - codes.view(3, 1, 1)) ** 2) / temperature).softmax(dim=0)
        mean = plus - minus
        ctx.save_for_backward((plus + minus - mean**2) * (2 / temperature))
        return mean

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None


def soft_ternarize(
    latent: Tensor,
    temperature: float,
    granularity: Granularity = "tensor",
    block_size: int = 128,
    scale: Tensor | None = None,
) -> Tensor:
    """Soft ternary weights ``[N, K]`` of a latent ``[N, K]``, in its dtype (Hestia, arXiv 2601.20745).

        scale * sum_c c p_c,   p = softmax(-(w / scale - c)^2 / T) over the codes c = -1, 0, 1

    The gradient is the true one with the scale held constant, ``2 / T`` times the variance of the code. Towards T = 0
    the weights are those of ``ternarize``. A learned ``scale`` gets its true gradient, times LSQ's factor.
    """
    if scale is None:
        with torch.no_grad():
            step = weight_scale(latent, granularity, block_size)
    else:
        factor = math.sqrt(scale.numel() / latent.numel())
        step = straight_through(scale.float() * factor, scale.detach().float().clamp(min=EPS))
    step = expand_scale(step, latent.shape[1], block_size)
    soft = _SoftCodes.apply(latent.float() / step, temperature) * step
    return soft.to(latent.dtype)  # type: ignore[no-any-return]


def is_among_largest(x: Tensor, share: float) -> Tensor:
    """Bool mask of the entries of ``x`` ``[..., K]`` among the ``round(share * K)`` largest magnitudes of their row, at
    least one; entries that tie with the last of them are in, too (top-k of BitNet a4.8, arXiv 2411.04965)."""
    magnitude = x.abs()
    kept = max(1, round(share * x.shape[-1]))
    return magnitude >= magnitude.topk(kept, dim=-1).values[..., -1:]


def fake_quantize_activation(
    x: Tensor,
    bits: int = 8,
    quant_lambda: float = 1.0,
    rounding: Rounding = "divide",
    kept_share: float = 1.0,
) -> Tensor:
    """``code * scale`` of activations ``[..., K]``, per token, straight-through, in the input's dtype.

    ``rounding`` concerns 8 bits; codes of 4 bits are always those of ``divide``. Below 1, ``kept_share`` sets the codes
    of all but that share of a token's largest inputs to zero; the scale is that of all.
    """
    with torch.no_grad():
        if bits == 8 and rounding == "multiply":
            factor = 127 / x.float().abs().amax(dim=-1, keepdim=True).clamp(min=EPS)
            quantized = (x.float() * factor).round_().clamp_(-128, 127).div_(factor).to(x.dtype)
        else:
            code, scale = quantize_int8(x) if bits == 8 else quantize_int4(x)
            quantized = code.mul_(scale).to(x.dtype)
        if kept_share < 1.0:
            quantized = torch.where(is_among_largest(x, kept_share), quantized, 0.0)
        if quant_lambda != 1.0:
            quantized = torch.lerp(x, quantized, quant_lambda)
    return straight_through(x, quantized)


def fake_quantize_state(x: Tensor, bits: int) -> Tensor:
    """What the codes of ``quantize_state`` stand for, straight-through, in the input's dtype."""
    with torch.no_grad():
        code, step = quantize_state(x, bits)
        quantized = code.sub_(2 ** (bits - 1)).mul_(step).to(x.dtype)
    return straight_through(x, quantized)
