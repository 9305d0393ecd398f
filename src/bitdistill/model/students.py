"""Student classes: the family's own Hugging Face class with its linears replaced in ``__init__``.

Attention, RoPE, caching and generation are inherited, never written again. Each row of ``families.py``
gives two classes, ``Bit<Family>Config`` and ``Bit<Family>ForCausalLM``, which are names of this module so that a
checkpoint's ``auto_map`` finds them: this file and its siblings are copied beside every student, and
``trust_remote_code=True`` loads it without the package.
"""

from fnmatch import fnmatch
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import initialization as init

from .families import FAMILIES, Family
from .layers import BitLinear, SubLN, TernarySpec
from .quant import Granularity  # noqa: F401  transformers before 5.10 copies only the files that this one imports


def ternary_sites(model: nn.Module, family: Family, skip: tuple[str, ...]) -> list[str]:
    """Paths of the linears of ``model`` that turn ternary, in module order."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.rpartition(".")[2] in family.linears
        and not any(fnmatch(name, pattern) for pattern in skip)
    ]


def has_norm(name: str, family: Family, norm_sites: str) -> bool:
    """Whether the ternary linear at path ``name`` gets a SubLN under this layout."""
    if norm_sites == "subln":
        return name.rpartition(".")[2] in family.linears_out
    return norm_sites == "all"


def install_bitlinears(model: nn.Module, family: Family, spec: TernarySpec, norm_eps: float) -> None:
    """Replace every ternary site of ``model`` by a fresh BitLinear, in place.

    Raises:
        ValueError: nothing would be replaced.
    """
    sites = ternary_sites(model, family, spec.skip)
    if not sites:
        raise ValueError(
            f"{type(model).__name__} has no linear named {', '.join(family.linears)} left to make ternary: "
            f"nothing would change. Check the model and the skip patterns {list(spec.skip)}."
        )
    for name in sites:
        linear = model.get_submodule(name)
        bit_linear = BitLinear(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            spec=spec,
            norm_eps=norm_eps if has_norm(name, family, spec.norm_sites) else None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        model.set_submodule(name, bit_linear)


def _student_classes(family: Family) -> tuple[Any, Any]:
    """Build the config and causal-LM classes of one family."""
    base_config = getattr(transformers, family.config_class)
    base_model = getattr(transformers, family.causal_lm_class)

    class StudentConfig(base_config):  # type: ignore[misc, valid-type]
        model_type = family.student_type

        def __init__(self, ternary: dict | None = None, **kwargs: object) -> None:
            super().__init__(**kwargs)
            self.ternary = TernarySpec(**(ternary or {})).to_dict()

    class StudentForCausalLM(base_model):  # type: ignore[misc, valid-type]
        config_class = StudentConfig
        config: StudentConfig

        def __init__(self, config: StudentConfig) -> None:
            super().__init__(config)
            spec = TernarySpec(**config.ternary)
            install_bitlinears(self, family, spec, getattr(config, family.norm_eps))
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            super()._init_weights(module)
            if isinstance(module, SubLN):
                init.ones_(module.weight)

    stem = family.causal_lm_class.removesuffix("ForCausalLM")
    for cls, name in (
        (StudentConfig, f"Bit{stem}Config"),
        (StudentForCausalLM, f"Bit{stem}ForCausalLM"),
    ):
        cls.__name__ = cls.__qualname__ = name
        cls.__module__ = __name__
    return StudentConfig, StudentForCausalLM


STUDENT_CLASSES: dict[str, tuple[Any, Any]] = {}
"""Full-precision ``model_type`` -> (student config class, student causal-LM class)."""

for _family in FAMILIES:
    _config_class, _model_class = _student_classes(_family)
    STUDENT_CLASSES[_family.model_type] = (_config_class, _model_class)
    globals()[_config_class.__name__] = _config_class
    globals()[_model_class.__name__] = _model_class


def register_students() -> None:
    """Make ``AutoConfig`` and ``AutoModelForCausalLM`` know the students, and let them save their code."""
    for config_class, model_class in STUDENT_CLASSES.values():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
        config_class.register_for_auto_class()
        model_class.register_for_auto_class("AutoModelForCausalLM")
