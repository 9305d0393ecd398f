"""What happens between optimizer steps: schedules, the metrics file, the progress bar."""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerState

from ..config import TrainingConfig
from ..model import BitLinear
from ..processes import process_state
from .schedule import codes_are_frozen, quant_lambda_at, soft_temperature_at, weight_decay_at
from .sharding import is_sharded
from .weights import Codes, bit_codes


class StepSchedules(TrainerCallback):
    """Set weight decay and the quantisation coefficient before every optimizer step."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config

    def on_step_begin(
        self,
        args: Any,
        state: TrainerState,
        control: Any,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        """Values are functions of the step, so a resumed run has the same ones."""
        decay = weight_decay_at(self.config, state.global_step, state.max_steps)
        frozen = codes_are_frozen(self.config, state.global_step, state.max_steps)
        for group in optimizer.param_groups:
            if group["decays"]:
                group["weight_decay"] = 0.0 if frozen and "latents" in group else decay
        quant_lambda = quant_lambda_at(self.config, state.global_step, state.max_steps)
        temperature = soft_temperature_at(self.config, state.global_step, state.max_steps)
        for module in model.modules():
            if isinstance(module, BitLinear):
                module.quant_lambda = quant_lambda
                module.soft_temperature = temperature


class CodeStatistics(TrainerCallback):
    """How an optimizer step changes the codes of a ternary student, at the steps that are logged.

    ``quant/flip_rate`` is the share of codes that this one step changed, so it does not depend on how far apart
    the lines are, nor on a resume between them. ``quant/zero_frac`` is the share of zeros after it.
    """

    def __init__(self, student: torch.nn.Module) -> None:
        self.student = student
        self.before: Codes | None = None
        self.is_sharded = False

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Keep the codes, if the step that begins will be logged."""
        step = state.global_step + 1
        is_logged = step == 1 or step % state.logging_steps == 0
        self.is_sharded = is_sharded(self.student)
        is_needed = is_logged and (state.is_world_process_zero or self.is_sharded)
        self.before = bit_codes(self.student) if is_needed else None

    def measure(self) -> dict[str, float]:
        """The statistics of the step that has ended; none for a full-precision model."""
        if not self.before:
            return {}
        after = bit_codes(self.student)
        counts = torch.tensor([
            sum(int((code != self.before[path]).sum()) for path, code in after.items()),
            sum(int((code == 0).sum()) for code in after.values()),
            sum(code.numel() for code in after.values()),
        ])  # fmt: skip
        self.before = None
        if self.is_sharded:
            counts = reduce(counts.to(process_state().device), reduction="sum")
        flips, zeros, total = counts.tolist()
        return {"quant/flip_rate": flips / total, "quant/zero_frac": zeros / total}


class MetricsFile(TrainerCallback):
    """Append one JSON line per log to ``metrics.jsonl``; a resumed run first drops what it will repeat."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.time_before = 0.0
        self.started = 0.0
        self.last: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start or continue the file."""
        self.reopen(state.global_step, is_writer=state.is_world_process_zero)

    def reopen(self, step: int, *, is_writer: bool) -> None:
        """Keep the lines of the steps that the resumed checkpoint has seen, up to ``step``."""
        self.started = time.monotonic()
        if not is_writer:
            return
        kept = []
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # a line the kill cut short
                    continue
                if record["step"] <= step:
                    kept.append(line)
                    self.last = record
                    self.time_before = record["perf/time_s"]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Write one line."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        self.last = {"step": state.global_step, **logs, "perf/time_s": round(self.time_s, 2)}
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(self.last) + "\n")

    @property
    def time_s(self) -> float:
        """Seconds of training, those before a resume included."""
        return self.time_before + time.monotonic() - self.started

    def summary(self) -> dict[str, Any]:
        """The last losses and the time, for the step's record."""
        losses = {key: value for key, value in self.last.items() if key.startswith(("loss", "heldout"))}
        return losses | {"steps": self.last.get("step"), "train_time_s": round(self.time_s, 2)}


class ProgressBar(TrainerCallback):
    """Steps, rate, time left and loss: a bar on a terminal, a line every half minute in a log file.

    Only the main process draws it.
    """

    LINE_EVERY_S = 30.0

    def __init__(self, title: str) -> None:
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[rate]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.title = title
        self.loss = self.heldout = ""
        self.first_step = 0
        self.started = self.last_line = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Draw the bar."""
        if not state.is_world_process_zero:
            return
        self.first_step = state.global_step
        self.started = self.last_line = time.monotonic()
        self.task = self.progress.add_task(
            self.title, total=state.max_steps, completed=state.global_step, rate="", loss=""
        )
        self.progress.start()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Move the bar, or write the line that is due."""
        if not state.is_world_process_zero:
            return
        now = time.monotonic()
        rate = (state.global_step - self.first_step) / max(now - self.started, 1e-9)
        shown = f"{rate:.1f} steps/s" if rate >= 1 else f"{1 / rate:.1f} s/step"
        self.progress.update(self.task, completed=state.global_step, rate=shown, loss=self.loss)
        is_last = state.global_step == state.max_steps
        if not self.console.is_terminal and (is_last or now - self.last_line >= self.LINE_EVERY_S):
            self.last_line = now
            left = (state.max_steps - state.global_step) / rate
            self.console.print(
                f"{self.title}  {state.global_step}/{state.max_steps}  {shown}  left {left:.0f} s  {self.loss}",
                highlight=False,
                soft_wrap=True,
            )

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Keep the last loss for display."""
        if logs and "loss" in logs:
            self.loss = f"loss {logs['loss']:.4g}"
            if "heldout/loss" in logs:
                self.heldout = f"  held-out perplexity {math.exp(logs['heldout/loss']):.4g}"
            self.loss += self.heldout

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Leave the finished line on the screen."""
        if state.is_world_process_zero:
            self.progress.stop()
