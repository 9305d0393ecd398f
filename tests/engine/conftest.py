"""What the engine's tests share: every kernel room by name, and small students of every family."""

from typing import Any

import pytest
import torch
from packed_student import LINEARS
from transformers import BitNetConfig, BitNetForCausalLM
from transformers.integrations.bitnet import AutoBitLinear

from bitdistill import _core


@pytest.fixture(params=_core.compiled_isas())
def isa(request: pytest.FixtureRequest) -> str:
    """Each room of this build; a room this CPU cannot run shows as a skip."""
    if request.param not in _core.available_isas():
        pytest.skip(f"this CPU cannot run {request.param}")
    return request.param


@pytest.fixture
def bitnet() -> Any:
    """A small ``BitNetForCausalLM`` with transformers' own online-quantising linears."""
    torch.manual_seed(2)
    config = BitNetConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    model = BitNetForCausalLM(config).eval()
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in LINEARS:
            linear = AutoBitLinear(module.in_features, module.out_features, bias=False, online_quant=True)
            linear.weight = module.weight
            model.set_submodule(name, linear)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model
