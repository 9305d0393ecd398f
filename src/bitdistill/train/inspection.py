"""What a checkpoint is, as plain facts for ``bitdistill inspect``."""

from pathlib import Path
from typing import Any

import torch

from ..model import BitLinear
from .loading import load_model
from .size import TERNARY_BITS, model_size
from .weights import ternary_codes


@torch.no_grad()
def inspect_checkpoint(source: str | Path) -> dict[str, Any]:
    """Family, layers, sizes and trit shares of a checkpoint.

    Raises:
        CheckpointError: it does not load.
    """
    model = load_model(source)
    layers = [m for m in model.modules() if isinstance(m, BitLinear)]
    own_norms = sum(name.endswith("_sub_norm") for name, _ in model.named_modules())  # a BitNet's are its own
    size = model_size(model)
    embedding = model.get_input_embeddings().weight.numel()
    facts: dict[str, Any] = {
        "model_type": model.config.model_type,
        "parameters": size.parameters,
        "embedding_parameters": embedding,
        "ternary_parameters": size.ternary_parameters,
        "ternary_linears": len(layers),
        "sub_norms": sum(m.norm is not None for m in layers) + own_norms,
        "bytes_packed": size.bytes,
        "bytes_at_16_bit": 2 * size.parameters,
    }
    if layers:
        codes = torch.cat([c.flatten() for c in ternary_codes(model).values()])
        facts |= {
            "ternary_spec": layers[0].spec.to_dict(),
            "bits_per_ternary_weight": TERNARY_BITS,
            "trit_shares": {str(v): round(float((codes == v).float().mean()), 4) for v in (-1, 0, 1)},
        }
    return facts
