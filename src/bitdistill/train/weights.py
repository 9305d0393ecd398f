"""The picture of the weights: where latents lie against the thresholds, trit shares, and flips."""

from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint import write_json
from ..model import FAMILIES, BitLinear, TernarySpec, ends_in
from ..model.quant import expand_scale, ternarize
from ..processes import is_main_process
from .sharding import is_sharded, own_part, whole

EDGE = 3.0
BINS = 120
NEAR_THRESHOLD = 0.05
"""Distance of |latent / scale| from 0.5 below which a small step flips the code."""

Codes = dict[str, Tensor]


def _sites(model: nn.Module) -> dict[str, nn.Linear]:
    """Ternary linears, or in a full-precision model those that would be."""
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    ternary = {path: m for path, m in linears.items() if isinstance(m, BitLinear)}
    names = tuple({name for family in FAMILIES for name in family.linears})
    return ternary or {path: m for path, m in linears.items() if ends_in(path, names)}


def _quantized(module: nn.Linear) -> tuple[Tensor, Tensor]:
    """Codes and latent / scale of one linear, ``[N, K]`` each; whole where FSDP2 shards it, one matrix at a time."""
    latent = whole(module.weight.detach())
    spec, learned = TernarySpec(), None
    if isinstance(module, BitLinear):
        spec, learned = module.spec, module.weight_scale
    if learned is not None:
        learned = whole(learned.detach())
    code, scale = ternarize(latent, spec.granularity, spec.block_size, spec.rounding, learned)
    block_size = spec.block_size
    return code, latent.float() / expand_scale(scale, latent.shape[1], block_size)


@torch.no_grad()
def ternary_codes(model: nn.Module) -> Codes:
    """Codes of every ternary site, int8, to count flips against later."""
    return {path: _quantized(module)[0].to("cpu", torch.int8) for path, module in _sites(model).items()}


@torch.no_grad()
def bit_codes(model: nn.Module) -> Codes:
    """Codes of the ternary linears alone, int8, where the weights are; of a sharded one the part that is here."""
    layers = {path: m for path, m in model.named_modules() if isinstance(m, BitLinear)}
    return {
        path: own_part(_quantized(module)[0].to(torch.int8), module.weight) for path, module in layers.items()
    }


@torch.no_grad()
def write_weight_stats(model: nn.Module, folder: Path, codes_before: Codes | None = None) -> None:
    """Write ``weights.json``: histogram of latent / scale, trit shares, mass near the thresholds, flips.

    Every process must call where the model is sharded; the main one writes.
    """
    sites = _sites(model)
    if not sites or not (is_main_process() or is_sharded(model)):
        return
    edges = torch.linspace(-EDGE, EDGE, BINS + 1)
    counts = torch.zeros(BINS)
    trits = torch.zeros(3)
    near = flips = total = 0.0
    for path, module in sites.items():
        code, ratio = _quantized(module)
        counts += torch.histc(ratio.cpu().clamp(-EDGE, EDGE), bins=BINS, min=-EDGE, max=EDGE)
        trits += torch.stack([(code == value).sum() for value in (-1, 0, 1)]).cpu()
        near += float(((ratio.abs() - 0.5).abs() < NEAR_THRESHOLD).sum())
        total += code.numel()
        if codes_before is not None:
            flips += float((code.to("cpu", torch.int8) != codes_before[path]).sum())
    if not is_main_process():
        return
    shares = (trits / total).tolist()
    write_json(
        folder / "weights.json",
        {
            "edges": [round(edge, 4) for edge in edges.tolist()],
            "counts": [int(count) for count in counts.tolist()],
            "minus_frac": shares[0],
            "zero_frac": shares[1],
            "plus_frac": shares[2],
            "near_threshold_frac": near / total,
            "flip_rate": flips / total if codes_before is not None else None,
        },
    )
