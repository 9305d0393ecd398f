"""What happens between optimizer steps: schedules, the metrics file, the progress bar."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..config import TrainingConfig
from ..model import BitLinear
from .schedule import quant_lambda_at, weight_decay_at


class StepSchedules(TrainerCallback):
    """Set weight decay and the quantisation coefficient before every optimizer step."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Values are functions of the step, so a resumed run has the same ones."""
        del args
        decay = weight_decay_at(self.config, state.global_step, state.max_steps)
        for group in optimizer.param_groups:
            # Trainer gives norms and biases a group with no decay; it must stay that way.
            if group.setdefault("decays", group["weight_decay"] > 0):
                group["weight_decay"] = decay
        quant_lambda = quant_lambda_at(self.config, state.global_step, state.max_steps)
        for module in model.modules():
            if isinstance(module, BitLinear):
                module.quant_lambda = quant_lambda


class MetricsFile(TrainerCallback):
    """Append one JSON line per log to ``metrics.jsonl``; a resumed run first drops what it will repeat."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.time_before = 0.0
        self.started = 0.0
        self.last: dict[str, Any] = {}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Keep the lines of the steps that the resumed checkpoint has seen."""
        del args, control, kwargs
        self.started = time.monotonic()
        if not state.is_world_process_zero:
            return
        kept = []
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # a line the kill cut short
                    continue
                if record["step"] <= state.global_step:
                    kept.append(line)
                    self.time_before = record["perf/time_s"]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line."""
        del args, control, kwargs
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
        losses = {key: value for key, value in self.last.items() if key.startswith("loss")}
        return losses | {"steps": self.last.get("step"), "train_time_s": round(self.time_s, 2)}


class ProgressBar(TrainerCallback):
    """One line: step, rate, time gone and left, loss. Only the main process draws it."""

    def __init__(self, title: str) -> None:
        self.progress = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:>5.0f}/{task.total:.0f} steps"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
        )
        self.title = title
        self.first_step = 0
        self.started = 0.0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Draw the bar."""
        del args, control, kwargs
        if not state.is_world_process_zero:
            return
        self.first_step, self.started = state.global_step, time.monotonic()
        self.task = self.progress.add_task(
            self.title, total=state.max_steps, completed=state.global_step, rate="", loss=""
        )
        self.progress.start()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Move the bar."""
        del args, control, kwargs
        if state.is_world_process_zero:
            seconds = max(time.monotonic() - self.started, 1e-9)
            rate = (state.global_step - self.first_step) / seconds
            self.progress.update(self.task, completed=state.global_step, rate=f"{rate:.1f} steps/s")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the last loss."""
        del args, control, kwargs
        if state.is_world_process_zero and logs and "loss" in logs:
            self.progress.update(self.task, loss=f"loss {logs['loss']:.3f}")

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Leave the finished line on the screen."""
        del args, control, kwargs
        if state.is_world_process_zero:
            self.progress.stop()
