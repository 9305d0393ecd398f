"""Native BitNet b1.58 (arXiv 2504.12285): Hugging Face's own ``BitNetForCausalLM`` with BitLinear for its linears.

The sub-norms, squared ReLU and bias-free projections are that class's. A checkpoint has the layout of
``microsoft/bitnet-b1.58-2B-4T-bf16``: latent weights and a ``quantization_config`` that makes transformers quantise
them in the forward pass. So transformers alone loads it, with equal logits, and ``load_model`` as a model to train.
"""

from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from ..model import BitLinear, TernarySpec

MODEL_TYPE = "bitnet"

ONLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
"""What of a ``quantization_config`` says that latents are stored and quantised in the forward pass."""

# The norms are the model's own; ties fall as transformers lets them.
SPEC = TernarySpec(norm_sites="none", rounding="multiply")


def is_native(config: PretrainedConfig) -> bool:
    """Whether a checkpoint of this config is a BitNet with latent weights, which can be trained."""
    quantization = quantization_of(config)
    is_online = ONLINE.items() <= quantization.items() and not quantization.get("use_rms_norm")
    return config.model_type == MODEL_TYPE and is_online


def without_quantization(config: PretrainedConfig) -> PretrainedConfig:
    """The same config, for loading the latents as they are."""
    values = config.to_dict()
    del values["quantization_config"]
    return type(config).from_dict(values)


def make_native(model: PreTrainedModel, quantization: dict[str, Any] | None = None) -> PreTrainedModel:
    """Make the linears of a full-precision ``BitNetForCausalLM`` ternary, in place; weights are shared, not copied.

    Args:
        quantization: the ``quantization_config`` of its checkpoint, which may exempt modules; by default all but the
            head are made ternary.
    """
    quantization = quantization or ONLINE | {"modules_to_not_convert": ["lm_head"]}
    exempt = ["lm_head", *(quantization.get("modules_to_not_convert") or ())]
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or not should_convert_module(name, exempt):
            continue
        rows, columns = linear.weight.shape
        bit_linear = BitLinear(
            columns, rows, bias=linear.bias is not None, spec=SPEC, norm_eps=None, device="meta"
        )
        bit_linear.weight, bit_linear.bias = linear.weight, linear.bias
        bit_linear.train(linear.training)
        model.set_submodule(name, bit_linear)
    model.config.quantization_config = quantization
    return model


def quantization_of(config: PretrainedConfig) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint; empty if it has none."""
    found = getattr(config, "quantization_config", None) or {}
    return dict(found if isinstance(found, dict) else found.to_dict())
