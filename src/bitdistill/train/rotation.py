"""Post-training rotations of a trained BitNet b1.58, the baselines of BitNet v2's table 4 (arXiv 2504.18415): QuaRot
(arXiv 2404.00456), and with learned matrices SpinQuant (arXiv 2405.16406; ``spinquant.py``).

A rotation makes outliers of activations vanish before their 4-bit quantiser, and is undone in the weights, which are
then made ternary (absmean) again. With row vectors x, a linear y = x W^T, and orthonormal R:

residual stream  R, ``[hidden, hidden]``. *Fused*: the embedding becomes E R, what writes to the stream R^T W, what
                 reads it W diag(g) R, and the head H diag(g) R. The gain g of a norm has to go into the linears behind
                 it, because RMSNorm commutes with R only without one; so nothing else may stand between a linear and
                 the stream. *Not fused*: q, k, v, gate and up quantise x R and turn it back, and keep the codes that
                 they were trained to.
o_proj           the values are rotated head by head: by matrices in v_proj's weight where it is fused, otherwise before
                 the quantiser. In the first case SubLN stands in between, whose gain goes into o_proj's weight. QuaRot
                 adds a Hadamard transform across heads before the quantiser.
down_proj        Hadamard transform before the quantiser, behind SubLN with its gain: nothing passes the activation
                 function or the product with the gate, so that one can be fused on the side of the weight only.

With the quantisers off a rotated model computes what the original does with its latents. It is made for evaluation and
calibration in this process; it is not a checkpoint.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..errors import SurgeryError
from ..model import BitLinear, Family, family_of, find_family
from ..model.hadamard import default_block, hadamard_transform
from ..model.quant import fake_quantize_activation, fake_quantize_weight
from .native import is_native

Kind = Literal["quarot", "spinquant"]


@dataclass
class Quantisers:
    """What the linears of a rotated model share, and what may be switched."""

    activation_bits: int = 4
    ternary: bool = True


@dataclass
class Rotations:
    """The matrices of a model: orthonormal parameters, of float32 at least."""

    residual: nn.Parameter
    """``[hidden, hidden]``."""
    heads: list[nn.Parameter]
    """``[head_dim, head_dim]`` of every layer."""
    across_heads: bool
    """Whether a Hadamard transform across the heads goes before o_proj's quantiser."""

    def parameters(self) -> list[nn.Parameter]:
        """All of them."""
        return [self.residual, *self.heads]


def random_hadamard(size: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """``diag(signs) H``, ``[size, size]``, orthonormal; H in blocks of the largest power of two that divides it."""
    signs = torch.randint(0, 2, (size,), generator=generator).to(dtype) * 2 - 1
    return hadamard_transform(signs.diag(), default_block(size))


class RotatedLinear(nn.Module):
    """A BitLinear whose input comes rotated or is rotated here, and whose weight undoes it.

    Shapes: ``[..., in_features] -> [..., out_features]``.
    """

    def __init__(self, linear: BitLinear, quantisers: Quantisers) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
        self.bias = None
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        self.norm = linear.norm
        self.spec = linear.spec
        self.quantisers = quantisers
        # In lists, so that a matrix that many linears share is a parameter of none.
        self._into: list[nn.Parameter] = []
        self._out: list[nn.Parameter] = []
        self._arrives_rotated = False
        self._turns_back = False
        self._block = 0
        self._heads = 0

    def rotate_input(self, matrix: nn.Parameter, *, arrives: bool = False, turn_back: bool = False) -> None:
        """Rotate runs of the input by ``matrix``; it ``arrives`` so, or is rotated here, and is turned back or not."""
        self._into, self._arrives_rotated, self._turns_back = [matrix], arrives, turn_back

    def rotate_output(self, matrix: nn.Parameter) -> None:
        """Rotate runs of the output by ``matrix``, in the weight."""
        self._out.append(matrix)

    def transform_input(self, block: int = 0, *, heads: int = 0) -> None:
        """A Hadamard transform before the quantiser: of blocks of features, or across ``heads``."""
        self._block, self._heads = block, heads

    def _hadamard(self, x: Tensor) -> Tensor:
        if self._block:
            x = hadamard_transform(x, self._block).to(x.dtype)
        if self._heads:
            by_head = x.unflatten(-1, (self._heads, -1)).transpose(-1, -2)
            mixed = hadamard_transform(by_head, default_block(self._heads)).to(x.dtype)
            x = mixed.transpose(-1, -2).flatten(-2)
        return x

    def effective_weight(self) -> Tensor:
        """The weight ``[N, K]`` behind the rotations, before its quantiser; differentiable in the matrices."""
        weight: Tensor = self.weight
        if self._into and not self._turns_back:
            weight = _in_runs(weight, self._into[0])
        weight = self._hadamard(weight)
        for matrix in self._out:
            weight = _in_runs(weight.T, matrix).T
        return weight

    def forward(self, x: Tensor) -> Tensor:
        spec = self.spec
        if self.norm is not None:
            x = self.norm(x)
        if self._into and not self._arrives_rotated:
            x = _in_runs(x, self._into[0])
        x = self._hadamard(x)
        if self.quantisers.activation_bits < 16:
            x = fake_quantize_activation(x, self.quantisers.activation_bits, rounding=spec.rounding)
        if self._turns_back:
            x = _in_runs(x, self._into[0].T)
        weight, bias = self.effective_weight(), self.bias
        if self.quantisers.ternary:
            weight = fake_quantize_weight(weight, spec.granularity, spec.block_size, rounding=spec.rounding)
        for matrix in self._out:
            bias = None if bias is None else _in_runs(bias, matrix)
        return F.linear(x, weight, bias)


class _Rotated(nn.Module):
    """The embedding of a rotated residual stream, E R, or with ``head`` its output head, H diag(g) R."""

    def __init__(self, module: nn.Module, matrix: nn.Parameter, gain: Tensor | None = None) -> None:
        super().__init__()
        self.module = module
        self._matrix = [matrix]
        self._gain = gain

    @property
    def weight(self) -> Tensor:
        """What transformers asks the two modules for."""
        return self.module.weight  # type: ignore[no-any-return, union-attr]

    def forward(self, x: Tensor) -> Tensor:
        if self._gain is None:
            return _in_runs(self.module(x), self._matrix[0])
        weight = _in_runs(self.weight * self._gain, self._matrix[0])
        return F.linear(x, weight, self.module.bias)  # type: ignore[arg-type, union-attr]


def _in_runs(x: Tensor, matrix: Tensor) -> Tensor:
    """``x`` ``[..., K]`` with every run of its features multiplied by ``matrix`` ``[n, n]`` from the right."""
    size = matrix.shape[0]
    return (x.unflatten(-1, (-1, size)) @ matrix.to(x.dtype)).flatten(-2)


def rotate(
    model: PreTrainedModel, *, kind: Kind, fused: bool, seed: int = 0
) -> tuple[PreTrainedModel, Rotations, Quantisers]:
    """A rotated copy of a trained b1.58 model, its matrices and its quantisers.

    Args:
        model: a student, or a native BitNet that is ready to train, of 8-bit activations.
        kind: ``quarot`` has Hadamard matrices for the heads and one more transform across them; ``spinquant`` has
            matrices to learn, which start as random Hadamard matrices.
        fused: whether the rotation of the residual stream goes into the weights of q, k, v, gate and up.
        seed: of the signs.

    Raises:
        SurgeryError: the model is no such decoder, or something stands between its linears and the stream.
    """
    family = find_family("llama") if is_native(model.config) else family_of(model.config.model_type)
    _check(model, family, fused)
    assert family is not None
    rotated = copy.deepcopy(model).eval().requires_grad_(False)
    config, device = rotated.config, rotated.device
    dtype = torch.promote_types(rotated.dtype, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    layers = rotated.base_model.layers
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)

    def matrix(size: int, signs: bool) -> nn.Parameter:
        plain = hadamard_transform(torch.eye(size, dtype=dtype), default_block(size))
        return nn.Parameter((random_hadamard(size, generator, dtype) if signs else plain).to(device))

    rotations = Rotations(
        matrix(config.hidden_size, signs=True),
        [matrix(width, signs=kind == "spinquant") for _ in layers],
        across_heads=kind == "quarot",
    )
    quantisers = Quantisers()
    for layer, of_heads in zip(layers, rotations.heads, strict=True):
        linears = _replace_linears(layer, quantisers)
        _rotate_layer(layer, linears, family, rotations.residual, fused)
        o_proj, down_proj = linears["o_proj"], linears["down_proj"]
        o_proj.rotate_input(of_heads, arrives=fused)
        if fused:
            o_proj.weight.mul_(_take_gain(o_proj.norm or getattr(layer.self_attn, "attn_sub_norm", None)))
            linears["v_proj"].rotate_output(of_heads)
        if rotations.across_heads:
            o_proj.transform_input(heads=heads)
        down_proj.transform_input(default_block(down_proj.weight.shape[1]))
    if fused:
        _rotate_stream_ends(rotated, family, rotations.residual)
    return rotated, rotations, quantisers


def _replace_linears(layer: nn.Module, quantisers: Quantisers) -> dict[str, RotatedLinear]:
    """A RotatedLinear for every BitLinear of a layer, by name."""
    found = {}
    for path, linear in [(p, m) for p, m in layer.named_modules() if isinstance(m, BitLinear)]:
        found[path.rpartition(".")[2]] = rotated = RotatedLinear(linear, quantisers)
        layer.set_submodule(path, rotated)
    return found


def _rotate_layer(
    layer: nn.Module, linears: dict[str, RotatedLinear], family: Family, residual: nn.Parameter, fused: bool
) -> None:
    """Rotate what the linears of a layer read from the residual stream and, fused, what they write to it."""
    for norm, readers in family.input_norms:
        gain = _take_gain(layer.get_submodule(norm), family.gain_offset) if fused else None
        for name in readers:
            if gain is not None:
                linears[name].weight.mul_(gain)
            linears[name].rotate_input(residual, arrives=fused, turn_back=not fused)
    if fused:
        for name in family.linears_out:
            linears[name].rotate_output(residual)


def _rotate_stream_ends(model: PreTrainedModel, family: Family, residual: nn.Parameter) -> None:
    """Embedding and head, which are tied no longer."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    gain = _take_gain(model.base_model.norm, family.gain_offset)
    model.base_model.embed_tokens = _Rotated(embedding, residual)
    model.lm_head = _Rotated(head, residual, gain)


def _take_gain(norm: nn.Module | None, offset: float = 0.0) -> Tensor:
    """The gain of a norm, which is neutral from then on; 1 where there is no norm."""
    if norm is None:
        return torch.ones(())
    weight: Tensor = norm.weight.data  # type: ignore[union-attr, assignment]
    gain = weight + offset
    weight.fill_(1.0 - offset)
    return gain


def _check(model: PreTrainedModel, family: Family | None, fused: bool) -> None:
    """Refuse a model that these rotations would change, or that has no use for them."""
    linears = {path: m for path, m in model.named_modules() if isinstance(m, BitLinear)}
    name = type(model).__name__
    if family is None or family.is_encoder or not linears:
        raise SurgeryError(f"{name} is no ternary decoder: rotate a student, or a native BitNet")
    specs = {m.spec for m in linears.values()}
    if any(spec.activation_bits != 8 or spec.int4_sites != "all" for spec in specs):
        raise SurgeryError(
            f"{name} was not trained with 8-bit activations throughout; rotate a plain BitNet b1.58"
        )
    # A block of one feature transforms nothing.
    if any(block != 1 for spec in specs for block in dict(spec.hadamard).values()) or any(
        spec.scale != "absmean" or spec.dead_zone_bias or spec.skip for spec in specs
    ):
        raise SurgeryError(
            f"{name} has Hadamard transforms, learned scales, biases of dead weights or full-precision linears, which "
            "a rotation does not preserve; rotate a plain BitNet b1.58"
        )
    if not fused:
        return
    known = {norm for norm, _ in family.input_norms}
    others = [
        child
        for child, m in model.base_model.layers[0].named_children()
        if "norm" in type(m).__name__.lower() and child not in known
    ]
    own = [path for path, m in linears.items() if m.norm is not None and path.endswith(family.linears_in)]
    if others or own:
        raise SurgeryError(
            f"{name}: {(others or own)[0]} stands between a linear and the residual stream, and its gain has no linear "
            "to go into; use the rotation that is not fused"
        )
