"""The steps of a run in the order it takes them, and which of them its folder holds already."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ..checkpoint import RUN_FILE
from ..config import BaseConfig, DistillConfig, PretrainConfig, Recipe, SftConfig
from ..model import TernarySpec
from ..pipeline import Method, StepRun, check_base, ordered_methods
from ..train import sft, stage1_refine, stage2_pretrain, stage3_distill
from ..train.stage1_refine import ternary_spec

Training = BaseConfig | PretrainConfig | SftConfig | DistillConfig
STAGES: dict[StepRun, str] = {
    stage1_refine.run: "refine",
    stage2_pretrain.run: "pretrain",
    sft.run: "sft",
    stage3_distill.run: "distill",
}


@dataclass(frozen=True)
class PlannedStep:
    """One step, before it is made."""

    folder: str
    """Below the run's folder."""
    stage: str
    """``base``, ``refine``, ``pretrain``, ``sft`` or ``distill``."""
    state: Literal["done", "started", "to do"]
    """By the folders alone: ``run`` also checks that what is there was made with these settings."""
    spec: TernarySpec | None
    """How the model that it makes is ternary; None in full precision."""
    training: Training | None
    """The section it trains by; None where it takes no gradient step."""


def planned_steps(recipe: Recipe) -> list[PlannedStep]:
    """Every step of ``bitdistill run``; one that methods share comes once.

    Raises:
        ConfigError: ``run`` would refuse the ``[base]``.
    """
    check_base(recipe)
    found: dict[str, PlannedStep] = {}
    for step in _steps(recipe):
        found.setdefault(step.folder, step)
    return list(found.values())


def _steps(recipe: Recipe) -> Iterator[PlannedStep]:
    if recipe.base is not None:
        if not recipe.base.continue_from:
            yield PlannedStep("base-blank", "base", _state(recipe, "base-blank"), None, None)
        yield PlannedStep("base", "base", _state(recipe, "base"), None, recipe.base)
    for method in ordered_methods(recipe):
        yield from _method_steps(recipe, method)


def _method_steps(recipe: Recipe, method: Method) -> Iterator[PlannedStep]:
    spec = None
    for folder, run, step_recipe in method.preparation(recipe):
        stage = STAGES[run]
        if stage == "refine":
            spec = ternary_spec(step_recipe.refine)
        training = step_recipe.pretrain if stage == "pretrain" else None
        yield PlannedStep(folder, stage, _state(recipe, folder), spec, training)
    for rate, folder in method.grid(recipe):
        run, step_recipe = method.fine_tune(recipe, rate, None)
        stage = STAGES[run]
        section = step_recipe.distill if stage == "distill" else step_recipe.sft
        yield PlannedStep(folder, stage, _state(recipe, folder), spec, section)


def _state(recipe: Recipe, folder: str) -> Literal["done", "started", "to do"]:
    path = recipe.run_dir / folder
    if (path / RUN_FILE).is_file():
        return "done"
    return "started" if (path.with_name(f"{path.name}.partial") / RUN_FILE).is_file() else "to do"
