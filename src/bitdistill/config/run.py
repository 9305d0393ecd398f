"""A whole recipe, and what ``bitdistill run`` compares."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .checks import check
from .data import CorpusConfig, ModelConfig, TaskConfig
from .stages import DistillConfig, PretrainConfig, RefineConfig, SftConfig
from .training import BaseConfig

METHODS = ("fp16_sft", "fp16_ct_sft", "bitnet_sft", "bitdistill")
"""FP16-SFT is the teacher (``distill.teacher_method`` may say otherwise); FP16-CT-SFT the full-precision control that
also sees the stage-2 text; BitNet-SFT the direct ternary fine-tune; BitDistill the three stages."""

LABELS = {
    "fp16_sft": "FP16-SFT",
    "fp16_ct_sft": "FP16-CT-SFT",
    "bitnet_sft": "BitNet-SFT",
    "bitdistill": "BitDistill",
}
"""Methods as tables call them."""

ABLATIONS = ("no_subln", "no_pretrain", "no_distill", "no_logits_kd", "no_relation_kd")
"""Switches written behind a method, as in ``bitdistill:no_pretrain`` or ``bitdistill:no_subln+no_distill``."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What ``bitdistill run`` compares."""

    methods: tuple[str, ...] = METHODS
    """Rows of the table: a method of METHODS, with ablations behind a colon if wanted."""
    learning_rates: tuple[float, ...] = ()
    """Grid for every task fine-tune, chosen on held-out training data; empty uses each section's own."""
    method_rates: tuple[str, ...] = ()
    """Learning rates of single methods, as ``method=rate``, in place of the grid: what an earlier run has chosen."""
    judged_on: Literal["test", "validation"] = "test"
    """Items behind the score of every row: ``validation`` never opens the test items, so that choices can be made."""

    def __post_init__(self) -> None:
        check(len(self.methods) > 0, "run.methods", self.methods, f"use some of {', '.join(METHODS)}")
        for method in self.methods:
            name, _, switches = method.partition(":")
            check(name in METHODS, "run.methods", method, f"use one of {', '.join(METHODS)}")
            for switch in filter(None, switches.split("+")):
                check(
                    switch in ABLATIONS,
                    "run.methods",
                    method,
                    f"ablations are {', '.join(ABLATIONS)}",
                )
            check(
                not switches or name == "bitdistill",
                "run.methods",
                method,
                "ablations go with bitdistill only",
            )
            idle = {"no_logits_kd", "no_relation_kd"} & set(switches.split("+"))
            check(
                "no_distill" not in switches.split("+") or not idle,
                "run.methods",
                method,
                f"no_distill leaves no teacher to learn from; drop {' and '.join(sorted(idle))}",
            )
        for rate in self.learning_rates:
            check(rate > 0, "run.learning_rates", rate, "use positive numbers")
        for entry in self.method_rates:
            method, rate = _method_rate(entry)
            remedy = f"write METHOD=RATE, with one of run.methods ({', '.join(self.methods)}) and a positive number"
            check(method in self.methods and rate > 0, "run.method_rates", entry, remedy)

    def rates_of(self, method: str) -> tuple[float, ...]:
        """Learning rates that a method tries; empty: the one of its section."""
        for name, rate in map(_method_rate, self.method_rates):
            if name == method:
                return (rate,)
        return self.learning_rates


def _method_rate(entry: str) -> tuple[str, float]:
    """Method and rate of ``method=rate``; a rate of 0 where there is none."""
    method, _, text = entry.partition("=")
    try:
        return method, float(text)
    except ValueError:
        return method, 0.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole recipe; every section has defaults, so a file holds only what differs."""

    name: str
    """Name of the run; its results go to ``<output_dir>/<name>``."""
    output_dir: str = "runs"
    """Folder of all runs."""
    steps_dir: str = ""
    """Folder of the steps and tokenised text that runs share, named by what decides them: a run makes what is not there
    and links to the rest. Empty: each run has its own."""
    seed: int = 0
    """Seed of weights, sample order and subsets."""
    model: ModelConfig = field(default_factory=ModelConfig)
    base: BaseConfig | None = None
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check(bool(self.name.strip()), "name", self.name, "give the run a name")
        check(0 <= self.seed < 2**32, "seed", self.seed, "use a whole number from 0 to 2^32 - 1")
        check(
            not (self.model.source and self.base),
            "model.source",
            self.model.source,
            "a recipe has either model.source or a [base] section, not both",
        )
        check(
            not (self.task.columns and self.base),
            "task.columns",
            self.task.columns,
            "the model of [base] is a decoder, which reads a prompt; write task.template",
        )
        self._check_int4()
        if self.base and not self.base.continue_from:
            check(
                self.corpus.sequence_length <= self.base.max_position_embeddings,
                "corpus.sequence_length",
                self.corpus.sequence_length,
                f"base.max_position_embeddings = {self.base.max_position_embeddings} is the longest; raise it, or use "
                "shorter sequences",
            )

    def _check_int4(self) -> None:
        """Activations turn to 4 bits once."""
        for name in ("pretrain", "sft", "distill"):
            ratio = getattr(self, name).int4_activations_ratio
            remedy = "refine.activation_bits = 4 has them from the first step; leave one of the two out"
            key = f"{name}.int4_activations_ratio"
            check(not ratio or self.refine.activation_bits != 4, key, ratio, remedy)
        skips_stage_2 = any("no_pretrain" in method for method in self.run.methods)
        ratio = self.distill.int4_activations_ratio
        check(
            not ratio or not self.pretrain.int4_activations_ratio or skips_stage_2,
            "distill.int4_activations_ratio",
            ratio,
            "stage 2 ends with 4-bit activations (pretrain.int4_activations_ratio), which stage 3 keeps; leave one of "
            "the two out",
        )

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.name

    @property
    def shared_steps(self) -> Path | None:
        """``steps_dir``, if there is one."""
        return Path(self.steps_dir) if self.steps_dir else None

    @property
    def shards_dir(self) -> Path:
        """Folder of the tokenised text."""
        return (self.shared_steps or self.run_dir) / "shards"

    def revision_of(self, source: str | Path) -> str | None:
        """The hub revision to load a checkpoint at: the recipe's for the recipe's model, none for any other."""
        return self.model.revision if str(source) == self.model.source else None
