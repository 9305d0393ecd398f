"""What the tests know of a family beyond its row: the peculiarities that a tiny model of it must show.

``FAMILY_NAMES`` are the decoders of the table, so a new row runs through every test that is parametrised by
``families``. Encoders have tests of their own (``tiny_encoders.py``).
"""

from typing import Any

import pytest
import transformers

from bitdistill.model import FAMILIES, find_family

FAMILY_NAMES = [family.model_type for family in FAMILIES if not family.is_encoder]
ENCODER_NAMES = [family.model_type for family in FAMILIES if family.is_encoder]
families = pytest.mark.parametrize("family", FAMILY_NAMES)

# Windows are shorter than the tests' sequences, and both kinds of layer are there where a family has two.
PECULIARITIES: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "mistral": {"sliding_window": 4},
    "smollm3": {"no_rope_layer_interval": 2},
    "gemma3_text": {"sliding_window": 4, "sliding_window_pattern": 2, "query_pre_attn_scalar": 24},
}


def dense_classes(family: str) -> tuple[Any, Any]:
    """The family's own config and causal-LM class."""
    row = find_family(family)
    assert row is not None
    return getattr(transformers, row.config_class), getattr(transformers, row.causal_lm_class)
