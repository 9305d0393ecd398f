"""What the engine's tests share: every kernel room by name, and small students of every family."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from packed_student import LINEARS
from transformers import BitNetConfig, BitNetForCausalLM, PreTrainedModel
from transformers.integrations.bitnet import AutoBitLinear

from bitdistill import _core
from bitdistill.model.students import STUDENT_CLASSES


@pytest.fixture(params=_core.compiled_isas())
def isa(request: pytest.FixtureRequest) -> str:
    """Each room of this build; a room this CPU cannot run shows as a skip."""
    if request.param not in _core.available_isas():
        pytest.skip(f"this CPU cannot run {request.param}")
    return request.param


def make_student(
    make_model: Callable[..., PreTrainedModel], family: str, ternary: dict, **changes: Any
) -> Any:
    """The small model of a family with ternary linears, and norm gains that are not neutral."""
    base = make_model(family, **changes)
    config_class, model_class = STUDENT_CLASSES[family]
    fields = base.config.to_dict()
    fields.pop("model_type")
    model = model_class(config_class(ternary=ternary, **fields)).eval()
    report = model.load_state_dict(base.state_dict(), strict=False)
    assert all(".norm.weight" in name for name in report.missing_keys)
    with torch.no_grad():
        for name in report.missing_keys:
            model.get_parameter(name).uniform_(0.5, 1.5)
    return model


@pytest.fixture
def student(make_model: Callable[..., PreTrainedModel]) -> Callable[..., Any]:
    """``student("qwen3", {"norm_sites": "all"}, tie_word_embeddings=False)``."""
    return lambda family, ternary=None, **changes: make_student(make_model, family, ternary or {}, **changes)


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
