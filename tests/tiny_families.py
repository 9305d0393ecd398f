"""What the tests know of a family beyond its row: tiny models of it, and the peculiarities that they must show.

``FAMILY_NAMES`` are the decoders of the table, so a new row runs through every test that is parametrised by
``families``. Encoders have tests of their own (``tiny_encoders.py``).
"""

from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from bitdistill.model import FAMILIES, STUDENT_CLASSES, find_family

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


def small_model(family: str, **changes: object) -> PreTrainedModel:
    """A random full-precision model with grouped-query attention, the same at every call.

    Weights are wide enough that logits differ by more than rounding; norm gains and biases are not neutral.
    """
    config_class, model_class = dense_classes(family)
    geometry = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "tie_word_embeddings": True,
        **PECULIARITIES.get(family, {}),
    }
    torch.manual_seed(1)
    model = model_class(config_class(**geometry | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith(".bias"):
                parameter.normal_(std=0.3)
    return model


def small_student(family: str, ternary: dict | None = None, **changes: object) -> PreTrainedModel:
    """A small random student with norm gains that are not neutral, and learned scales that are no absmean."""
    base = small_model(family, **changes)
    config_class, model_class, *_ = STUDENT_CLASSES[family]
    fields = base.config.to_dict()
    fields.pop("model_type")
    model = model_class(config_class(ternary=ternary or {}, **fields)).eval()
    report = model.load_state_dict(base.state_dict(), strict=False)
    assert all(name.endswith((".norm.weight", ".weight_scale")) for name in report.missing_keys)
    with torch.no_grad():
        for name in report.missing_keys:
            parameter = model.get_parameter(name)
            drawn = torch.empty_like(parameter).uniform_(0.5, 1.5)
            parameter.copy_(drawn * parameter if name.endswith("scale") else drawn)
    return model
