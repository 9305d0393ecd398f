"""Student classes: the family's own Hugging Face class with its linears replaced in ``__init__``.

Attention, RoPE, caching and generation are inherited, never written again. Each row of ``families.py``
gives ``Bit<Family>Config`` and ``Bit<Family>ForCausalLM`` (an encoder ``...ForMaskedLM`` and
``...ForSequenceClassification``), which are names of this module so that a checkpoint's ``auto_map`` finds them: this
file and its siblings are copied beside every student, and ``trust_remote_code=True`` loads it without the package.
"""

import math
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig
from transformers import initialization as init

from .families import FAMILIES, Family, ends_in
from .hadamard import HADAMARD_SITES, resolve_block
from .layers import BitLinear, SubLN, TernarySpec
from .quant import Granularity  # noqa: F401  transformers before 5.10 copies only the files that this one imports


def ternary_sites(model: nn.Module, family: Family, skip: tuple[str, ...]) -> list[str]:
    """Paths of the linears of ``model`` that turn ternary, in module order."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and ends_in(name, family.linears)
        and not any(fnmatch(name, pattern) for pattern in skip)
    ]


def has_norm(name: str, family: Family, norm_sites: str) -> bool:
    """Whether the ternary linear at path ``name`` gets a SubLN under this layout."""
    if norm_sites == "subln":
        return ends_in(name, family.linears_out)
    return norm_sites == "all"


def hadamard_site(name: str, family: Family) -> str | None:
    """Which of HADAMARD_SITES the ternary linear at path ``name`` is; None for any other."""
    ends = zip(HADAMARD_SITES, family.linears_out, strict=True)
    return next((site for site, end in ends if ends_in(name, (end,))), None)


def resolve_hadamard(model: nn.Module, family: Family, spec: TernarySpec, sites: list[str]) -> TernarySpec:
    """``spec`` with the blocks that its Hadamard transforms have at the ternary ``sites`` of ``model``.

    Raises:
        ValueError: a block does not divide its dimension, or no site is left.
    """
    blocks = {}
    for site, block in dict(spec.hadamard).items():
        dims = [
            model.get_submodule(name).in_features for name in sites if hadamard_site(name, family) == site
        ]
        if dims:
            blocks[site] = resolve_block(math.gcd(*dims), block, f"the input of {site}")
    if spec.hadamard and not blocks:
        raise ValueError(f"ternary.hadamard: the skip patterns {list(spec.skip)} leave no site to transform")
    return replace(spec, hadamard=blocks)


def install_bitlinears(model: nn.Module, family: Family, spec: TernarySpec, norm_eps: float) -> TernarySpec:
    """Replace every ternary site of ``model`` by a fresh BitLinear, in place; returns ``spec`` with blocks resolved.

    Raises:
        ValueError: nothing would be replaced, or a Hadamard block does not divide its dimension.
    """
    sites = ternary_sites(model, family, spec.skip)
    if not sites:
        raise ValueError(
            f"{type(model).__name__} has no linear named {', '.join(family.linears)} left to make ternary: "
            f"nothing would change. Check the model and the skip patterns {list(spec.skip)}."
        )
    spec = resolve_hadamard(model, family, spec, sites)
    blocks = dict(spec.hadamard)
    for name in sites:
        linear = model.get_submodule(name)
        site = hadamard_site(name, family)
        bit_linear = BitLinear(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            spec=spec,
            norm_eps=norm_eps if has_norm(name, family, spec.norm_sites) else None,
            hadamard_block=blocks.get(site, 0) if site else 0,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        model.set_submodule(name, bit_linear)
    return spec


def _config_class(family: Family) -> Any:
    """Build the student config class of one family."""
    base_config = getattr(transformers, family.config_class)

    class StudentConfig(base_config):  # type: ignore[misc, valid-type]
        model_type = family.student_type

        def __init__(self, ternary: dict | None = None, **kwargs: object) -> None:
            super().__init__(**kwargs)
            self.ternary = TernarySpec(**(ternary or {})).to_dict()

    stem, _, _ = next(iter(family.model_classes.values())).partition("For")
    return _named(StudentConfig, f"Bit{stem}Config")


def _model_class(family: Family, student_config: Any, name: str) -> Any:
    """Build the student of the family's class ``name``."""
    base_model = getattr(transformers, name)

    class Student(base_model):  # type: ignore[misc, valid-type]
        config_class = student_config
        config: student_config

        def __init__(self, config: student_config) -> None:
            super().__init__(config)
            spec = TernarySpec(**config.ternary)
            spec = install_bitlinears(self, family, spec, getattr(config, family.norm_eps))
            config.ternary = spec.to_dict()
            self.post_init()

        def initialize_weights(self) -> None:
            """Not ``_init_weights``: transformers asks the decoder inside for that, which is the family's own class."""
            super().initialize_weights()
            for module in self.modules():
                if isinstance(module, SubLN):
                    init.ones_(module.weight)
                if isinstance(module, BitLinear) and module.weight_scale is not None:
                    init.copy_(module.weight_scale, module.absmean())

    return _named(Student, f"Bit{name}")


def _named(cls: Any, name: str) -> Any:
    cls.__name__ = cls.__qualname__ = name
    cls.__module__ = __name__
    globals()[name] = cls
    return cls


def _student_classes(family: Family) -> tuple[Any, ...]:
    config = _config_class(family)
    return config, *(_model_class(family, config, name) for name in family.model_classes.values())


STUDENT_CLASSES: dict[str, tuple[Any, ...]] = {f.model_type: _student_classes(f) for f in FAMILIES}
"""Full-precision ``model_type`` -> (student config class, student classes in the order of ``Family.model_classes``)."""


def student_class(family: Family, name: str) -> Any:
    """The student of the family's class ``name``; None where it has no such class."""
    classes = zip(family.model_classes.values(), STUDENT_CLASSES[family.model_type][1:], strict=True)
    return dict(classes).get(name)


def register_students() -> None:
    """Make the auto classes know the students, and let them save their code."""
    for family in FAMILIES:
        config_class, *model_classes = STUDENT_CLASSES[family.model_type]
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        config_class.register_for_auto_class()
        for auto_class, model_class in zip(family.model_classes, model_classes, strict=True):
            getattr(transformers, auto_class).register(config_class, model_class, exist_ok=True)
            model_class.register_for_auto_class(auto_class)
