"""BitLinear and SubLN: the two layers that make a model ternary.

BitLinear (b1.58):       y = Q_int8(SubLN(x)) @ Q_ternary(W).T + b, with the norm only where the student has one.
H-BitLinear (BitNet v2): y = Q(H SubLN(x)) @ Q_ternary(W).T + b, Q of 8 or 4 bits, H in blocks (``hadamard.py``).

The norm is a *child* of its linear: ``o_proj.weight`` stays where every tool expects it, and
``o_proj.norm.weight`` is new.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .hadamard import HADAMARD_SITES, hadamard_transform, resolve_block
from .low_bit_states import KV_BITS, QUERY_BITS
from .quant import (
    Granularity,
    Rounding,
    ScaleRule,
    dead_zone_bias,
    fake_quantize_activation,
    fake_quantize_weight,
    scale_shape,
    soft_ternarize,
    ternarize,
    weight_scale,
)

NORM_SITES = ("none", "subln", "all")
GRANULARITIES = ("tensor", "channel", "block")
ACTIVATION_BITS = (4, 8, 16)
ROUNDINGS = ("divide", "multiply")
SCALES = ("absmean", "learned")
INT4_SITES = ("all", "inputs")
TOP_K_SHARE = 0.5
"""Share of o_proj's inputs that BitNet a4.8 keeps of a token."""
OPTIONAL = {"dead_zone_bias": 0.0, "hadamard": {}, "int4_sites": "all", "query_bits": 16, "kv_bits": 16}
"""Keys that came later -> the value that stands for their absence in ``config.json``."""


@dataclass(frozen=True, kw_only=True)
class TernarySpec:
    """What makes a student ternary; stored in ``config.json`` under ``ternary``."""

    norm_sites: str = "subln"
    """``subln``: a norm before o_proj and down_proj (the paper); ``all``: before every linear (the authors'
    code); ``none``: no new norm (the BitNet-SFT baseline)."""
    granularity: Granularity = "tensor"
    """Weights that share one scale: ``tensor``, ``channel`` (output row) or ``block``."""
    block_size: int = 128
    """Input features per scale when ``granularity`` is ``block``."""
    activation_bits: int = 8
    """8 (absmax INT8), 4 (absmean INT4) or 16 (activations left alone)."""
    skip: tuple[str, ...] = ()
    """Glob patterns of linears that stay full precision."""
    rounding: Rounding = "divide"
    """How ties fall: as in the papers' formulas, or (``multiply``, of 8 bits) as in Hugging Face's BitNet."""
    scale: ScaleRule = "absmean"
    """``absmean``: of the latents, in every forward pass; ``learned``: a parameter beside them, trained as in LSQ."""
    dead_zone_bias: float = 0.0
    """Share of the dead weights' sum that is added to each output (``quant.dead_zone_bias``); 0 adds nothing."""
    hadamard: Mapping[str, int] | tuple[tuple[str, int], ...] = ()
    """Site of HADAMARD_SITES -> features of a block of the Hadamard transform before its activation quantiser; kept as
    pairs. 0 asks for the largest block; a student's own config has it resolved."""
    int4_sites: str = "all"
    """Where activations of 4 bits are: ``all`` linears, or ``inputs``, those that read the residual stream, while
    o_proj and down_proj keep 8 bits, o_proj those of its larger half alone (BitNet a4.8)."""
    query_bits: int = 16
    """Bits of the queries (``low_bit_states.py``); 16 leaves them alone."""
    kv_bits: int = 16
    """Bits of the keys and values; 16 leaves them alone."""

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("norm_sites", self.norm_sites, NORM_SITES),
            ("granularity", self.granularity, GRANULARITIES),
            ("activation_bits", self.activation_bits, ACTIVATION_BITS),
            ("rounding", self.rounding, ROUNDINGS),
            ("scale", self.scale, SCALES),
            ("int4_sites", self.int4_sites, INT4_SITES),
            ("query_bits", self.query_bits, QUERY_BITS),
            ("kv_bits", self.kv_bits, KV_BITS),
        ):
            if value not in allowed:
                raise ValueError(f"ternary.{name} = {value!r}: use one of {', '.join(map(str, allowed))}")
        if self.block_size < 1:
            raise ValueError(f"ternary.block_size = {self.block_size}: use a positive number of features")
        if self.scale == "learned" and self.rounding != "divide":
            raise ValueError(
                "ternary.scale = 'learned': Hugging Face's BitNet (rounding = 'multiply') computes its scales; "
                "use scale = 'absmean' with it"
            )
        if not 0 <= self.dead_zone_bias < float("inf"):
            raise ValueError(f"ternary.dead_zone_bias = {self.dead_zone_bias!r}: use 0 or more")
        object.__setattr__(self, "skip", tuple(self.skip))
        object.__setattr__(self, "hadamard", self._hadamard_pairs())

    def _hadamard_pairs(self) -> tuple[tuple[str, int], ...]:
        try:
            blocks = dict(self.hadamard)
        except (TypeError, ValueError) as error:
            raise ValueError(f"ternary.hadamard = {self.hadamard!r}: use a block for each site") from error
        for site, block in blocks.items():
            if site not in HADAMARD_SITES:
                raise ValueError(f"ternary.hadamard = {blocks!r}: use sites of {', '.join(HADAMARD_SITES)}")
            if type(block) is not int or block < 0 or block & (block - 1):
                raise ValueError(f"ternary.hadamard = {blocks!r}: use powers of two, or 0 for the largest")
        return tuple((site, blocks[site]) for site in HADAMARD_SITES if site in blocks)

    def to_dict(self) -> dict:
        """The form that ``config.json`` holds."""
        values = asdict(self) | {"skip": list(self.skip), "hadamard": dict(self.hadamard)}
        # Students without a later key stay what they were before there was one.
        return {k: v for k, v in values.items() if k not in OPTIONAL or v != OPTIONAL[k]}


class SubLN(nn.Module):
    """RMSNorm on the input of a ternary linear (BitDistill, eq. 4-5), computed in fp32.

    Shapes: ``[..., dim] -> [..., dim]``, dtype kept. The gain starts at 1 unless stage 1 calibrates it.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class BitLinear(nn.Linear):
    """A linear with ternary weights and low-bit activations; latent weight and bias stay float.

    Shapes: ``[..., in_features] -> [..., out_features]``. ``quant_lambda`` is the warm-up coefficient that the
    trainer moves from 0 to 1; evaluation always uses 1, so a model is judged as it will be exported. So it is with
    ``soft_temperature``: above 0 the weights of a training step have soft codes at that temperature.
    ``hadamard_block``: features of a block of the Hadamard transform of the input; 0 leaves it out. ``output_site``:
    which of HADAMARD_SITES it is, if one.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        spec: TernarySpec,
        norm_eps: float | None,
        hadamard_block: int = 0,
        output_site: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        if hadamard_block:
            resolve_block(in_features, hadamard_block)
        self.spec = spec
        self.hadamard_block = hadamard_block
        self.output_site = output_site
        self.quant_lambda = 1.0
        self.soft_temperature = 0.0
        self.norm = SubLN(in_features, norm_eps).to(device=device) if norm_eps is not None else None
        self.weight_scale: nn.Parameter | None = None
        if spec.scale == "learned":
            shape = scale_shape(out_features, in_features, spec.granularity, spec.block_size)
            self.weight_scale = nn.Parameter(torch.empty(shape, device=device))
            with torch.no_grad():
                self.weight_scale.copy_(self.absmean())

    def absmean(self) -> Tensor:
        """Absmean scale of the latents as they are, where a learned scale starts; see ``weight_scale``."""
        return weight_scale(self.weight.detach(), self.spec.granularity, self.spec.block_size)

    def ternarized(self) -> tuple[Tensor, Tensor]:
        """Codes ``[N, K]`` and scale of the latent weight, as the forward pass has them; see ``ternarize``."""
        spec = self.spec
        scale = None if self.weight_scale is None else self.weight_scale.detach()
        return ternarize(self.weight.detach(), spec.granularity, spec.block_size, spec.rounding, scale)

    def inputs(self, x: Tensor) -> Tensor:
        """What the weight multiplies but for the quantiser of activations: ``x`` ``[..., K]`` behind the norm and the
        Hadamard transform, in the transform's fp32 where there is one."""
        if self.norm is not None:
            x = self.norm(x)
        return hadamard_transform(x, self.hadamard_block) if self.hadamard_block else x

    def quantized_inputs(self, x: Tensor, quant_lambda: float = 1.0) -> Tensor:
        """What the weight multiplies: ``inputs`` of ``x`` ``[..., K]``, quantised, in the dtype of ``x``."""
        spec, dtype = self.spec, x.dtype
        bits, kept = spec.activation_bits, 1.0
        if bits == 4 and spec.int4_sites == "inputs" and self.output_site is not None:
            bits, kept = 8, TOP_K_SHARE if self.output_site == "o_proj" else 1.0
        x = self.inputs(x)
        if bits < 16:
            x = fake_quantize_activation(x, bits, quant_lambda, spec.rounding, kept)
        return x.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        quant_lambda = self.quant_lambda if self.training else 1.0
        x = self.quantized_inputs(x, quant_lambda)
        bias = self._bias(quant_lambda)
        if self.training and self.soft_temperature > 0:
            spec = self.spec
            weight = soft_ternarize(
                self.weight, self.soft_temperature, spec.granularity, spec.block_size, self.weight_scale
            )
            return F.linear(x, weight, bias)
        weight = fake_quantize_weight(
            self.weight,
            self.spec.granularity,
            self.spec.block_size,
            quant_lambda,
            self.spec.rounding,
            self.weight_scale,
        )
        return F.linear(x, weight, bias)

    def _bias(self, quant_lambda: float) -> Tensor | None:
        """The bias with that of the dead weights, which the warm-up mixes in as it does the codes."""
        if not self.spec.dead_zone_bias:
            return self.bias
        code, _ = self.ternarized()
        dead = dead_zone_bias(self.weight, code, quant_lambda * self.spec.dead_zone_bias).to(
            self.weight.dtype
        )
        return dead if self.bias is None else self.bias + dead

    def extra_repr(self) -> str:
        scale = f"{self.spec.scale} scale per {self.spec.granularity}"
        transform = f", H{self.hadamard_block}" if self.hadamard_block else ""
        return f"{super().extra_repr()}, {scale}, A{self.spec.activation_bits}{transform}"
