"""A run put down as plain data: its steps, what its models are, what each step takes."""

import os
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..config import BaseConfig, DistillConfig, PretrainConfig, Recipe
from ..errors import ConfigError
from ..processes import process_state
from ..train.loading import convertible_family, is_encoder, load_config
from ..train.objective import autocast_dtype
from ..train.surgery import SurgeryReport
from ..train.trainer import steps_for_epochs, steps_for_tokens
from .memory import StepMemory, TrainingStep, step_memory
from .models import Blueprint, config_text, geometry, source_config, surgery_report
from .operations import distillation_flops, measured_throughput, student_flops
from .steps import PlannedStep, Training, planned_steps
from .tokens import task_tokens


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the run would be made on; what is None is taken from this machine."""

    processes: int = 1
    flops: float | None = None
    """Peak operations a second of one device; None measures a matrix product here."""
    utilisation: float = 0.4
    """Share of ``flops`` that training reaches."""
    memory: float | None = None
    """Bytes of one device."""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ConfigError(f"--processes {self.processes}: use 1 or more")
        for option, value in (("--flops", self.flops), ("--device-memory", self.memory)):
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{option} {value:g}: use a positive number")
        if not 0 < self.utilisation <= 1:
            raise ConfigError(f"--utilisation {self.utilisation:g}: use a share in (0, 1]")


def plan_run(recipe: Recipe, machine: Machine) -> dict[str, Any]:
    """What ``bitdistill run`` would do and take. Reads configs, the task where it is at hand, and folder names.

    Raises:
        BitDistillError: what ``run`` would refuse before it trains.
    """
    return _Planner(recipe, machine).plan()


class _Planner:
    def __init__(self, recipe: Recipe, machine: Machine) -> None:
        self.recipe, self.machine = recipe, machine
        self.steps = planned_steps(recipe)
        config = source_config(recipe)
        if is_encoder(config):
            raise ConfigError(
                f"a dry run plans decoders, and {config.model_type} is an encoder; leave out --dry-run"
            )
        if any(step.spec is not None for step in self.steps):
            convertible_family(config.model_type)
        self.base = Blueprint(config_text(config))
        self.teacher = self.base
        if recipe.distill.teacher and any(step.stage == "distill" for step in self.steps):
            teacher = load_config(recipe.distill.teacher, recipe.distill.teacher_revision)
            self.teacher = Blueprint(config_text(teacher))
        self.corpus_teacher = self.base
        if recipe.pretrain.teacher:
            teacher = load_config(recipe.pretrain.teacher, recipe.revision_of(recipe.pretrain.teacher))
            self.corpus_teacher = Blueprint(config_text(teacher))
        self.task = task_tokens(recipe)
        self.throughput: dict[str, float] = {}

    def plan(self) -> dict[str, Any]:
        steps = [self._step(step) for step in self.steps]
        memory = self.machine.memory or _device_memory()
        specs = {step.spec for step in self.steps if step.spec is not None}
        reports = [report for spec in specs if (report := surgery_report(Blueprint(self.base.config, spec)))]
        return {
            "name": self.recipe.name,
            "folder": str(self.recipe.run_dir),
            "processes": self.machine.processes,
            "device_memory": memory,
            "utilisation": self.machine.utilisation,
            "flops_per_second": self.throughput,
            "flops_measured": self.machine.flops is None,
            "task": {
                "name": self.recipe.task.name,
                "examples": self.task.examples,
                "longest": self.task.longest,
                "basis": self.task.basis,
            },
            "models": sorted((_model_facts(r) for r in reports), key=lambda facts: facts["norms"]),
            "steps": steps,
            "seconds_left": sum(s.get("seconds", 0.0) for s in steps if s["state"] != "done"),
        }

    def _step(self, step: PlannedStep) -> dict[str, Any]:
        facts: dict[str, Any] = {"folder": step.folder, "stage": step.stage, "state": step.state}
        facts["model"] = "full precision" if step.spec is None else f"ternary, norms {step.spec.norm_sites}"
        config = step.training
        if config is None:
            return facts
        bf16 = autocast_dtype(config.precision) is torch.bfloat16
        tokens, sequences, steps, length = self._work(config)
        memory = step_memory(self._traced_step(step, config, length, bf16))
        packed = isinstance(config, BaseConfig | PretrainConfig)
        labelled = length - 1 if packed else self.task.labelled
        flops = round(sequences * self._sequence_flops(step, tokens / sequences, labelled))
        throughput = self._throughput("bf16" if bf16 else "fp32")
        seconds = flops / (throughput * self.machine.utilisation * self.machine.processes)
        return facts | {
            "learning_rate": config.learning_rate,
            "precision": "bf16" if bf16 else "fp32",
            "global_batch": config.batch_size * config.gradient_accumulation_steps * self.machine.processes,
            "optimizer_steps": steps,
            "tokens": tokens,
            "flops": flops,
            "seconds": seconds,
            "memory": self._memory_facts(memory),
            "checkpoint_bytes": memory.weights,
        }

    def _work(self, config: Training) -> tuple[int, int, int, int]:
        """Tokens that are computed, sequences they are in, optimizer steps, and the longest sequence."""
        processes = self.machine.processes
        size = config.batch_size * config.gradient_accumulation_steps * processes  # every step is full
        if isinstance(config, BaseConfig | PretrainConfig):
            length = self.recipe.corpus.sequence_length
            steps = steps_for_tokens(config, config.tokens, length, processes)
            return steps * size * length, steps * size, steps, length
        steps = steps_for_epochs(config, config.epochs, self.task.examples, processes)
        epochs = steps * size / self.task.examples
        tokens = round(epochs * self.task.per_epoch(config, self.recipe.seed, processes))
        return tokens, steps * size, steps, self.task.longest

    def _sequence_flops(self, step: PlannedStep, length: float, labelled: float) -> float:
        student = geometry(Blueprint(self.base.config, step.spec))
        flops = student_flops(student, length, labelled)
        teacher, distill = self._taught_by(step.training)
        if teacher is not None and distill is not None:
            flops += distillation_flops(student, geometry(teacher), distill, length, labelled)
        return flops

    def _taught_by(self, config: Training | None) -> tuple[Blueprint | None, DistillConfig | None]:
        """The teacher of a step and the losses that hold the student against it; None where it has none."""
        if isinstance(config, DistillConfig):
            return self.teacher, config
        distill = config.distillation if isinstance(config, PretrainConfig) else None
        return (self.corpus_teacher if distill else None), distill

    def _throughput(self, precision: str) -> float:
        if precision not in self.throughput:
            self.throughput[precision] = self.machine.flops or measured_throughput(precision)
        return self.throughput[precision]

    def _traced_step(self, step: PlannedStep, config: Training, length: int, bf16: bool) -> TrainingStep:
        packed = isinstance(config, BaseConfig | PretrainConfig)
        teacher, distill = self._taught_by(config)
        return TrainingStep(
            student=Blueprint(self.base.config, step.spec),
            batch_size=config.batch_size,
            length=length,
            labelled=length - 1 if packed else self.task.most_labelled,
            padded=not packed,
            bf16=bf16,
            accumulation=config.gradient_accumulation_steps,
            averaged=bool(config.ema_decay),
            soft=config.quant_warmup_form == "soft",
            teacher=teacher,
            distill=distill,
        )

    def _memory_facts(self, memory: StepMemory) -> dict[str, int]:
        facts = asdict(memory) | {"ddp": memory.replicated(self.machine.processes)}
        return facts | {"fsdp2": memory.sharded(self.machine.processes)}


def _model_facts(report: SurgeryReport) -> dict[str, Any]:
    return {
        "family": report.family,
        "linears": len(report.replaced),
        "norms": sum(norm for _, _, norm in report.replaced),
        "full_precision_linears": len(report.skipped),
        "parameters": report.after.parameters,
        "parameters_before": report.before.parameters,
        "ternary_share": report.after.ternary_parameters / report.after.parameters,
        "bytes_at_16_bit": report.before.bytes,
        "bytes_packed": report.after.bytes,
    }


def _device_memory() -> int | None:
    """Bytes of this process's device; of main memory where that is the CPU. None if it cannot be known."""
    if process_state().device.type == "cuda":
        return int(torch.cuda.mem_get_info()[1])
    if process_state().device.type == "cpu" and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
