"""The training loop: ``transformers.Trainer`` with a thin subclass, so that processes, precision, accumulation,
trackers and resume are the ecosystem's.

What is ours: the objective's loss and its totals over an optimizer step, schedules that are functions of the
step, a sample order that is a function of (seed, epoch), and a saved checkpoint that is the student alone.
"""

import json
import logging
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.utils import logging as hf_logging

from ..config import TrainingConfig
from ..errors import CheckpointError, TrainingError
from ..processes import num_processes
from ..recipe import to_dict
from .callbacks import CodeStatistics, EpochOrder, MetricsFile, ProgressBar, StepSchedules
from .heldout import HeldoutLoss
from .objective import LanguageModelling, autocast_dtype
from .schedule import learning_rate_factor

logger = logging.getLogger(__name__)

LENGTH_WINDOW = 32
"""Batches that are sorted by length together: short sequences then share batches, order stays random."""


class SeededOrder(Sampler[int]):
    """Sample order as a function of (seed, epoch); with lengths, batches hold sequences of similar length."""

    def __init__(self, size: int, seed: int, batch_size: int, lengths: list[int] | None) -> None:
        self.size, self.seed, self.batch_size, self.lengths = size, seed, batch_size, lengths
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next; called by the data loader."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.size, generator=generator).tolist()
        if self.lengths is None:
            yield from order
            return
        window = self.batch_size * LENGTH_WINDOW
        batches = []
        for start in range(0, self.size, window):
            indices = sorted(order[start : start + window], key=self.lengths.__getitem__)
            batches += [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
        # The one short batch stays last: everything else keeps full batches in random order.
        last = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[index]
        yield from (index for batch in last for index in batch)


class StudentTrainer(Trainer):
    """Trainer of an objective; what it saves and loads is the student inside."""

    def __init__(
        self,
        *,
        objective: LanguageModelling,
        config: TrainingConfig,
        args: TrainingArguments,
        train_dataset: Dataset,
        data_collator: Any,
        tokenizer: PreTrainedTokenizerBase,
        lengths: list[int] | None,
        heldout: HeldoutLoss | None,
    ) -> None:
        super().__init__(
            model=objective,
            args=args,
            train_dataset=train_dataset,
            data_collator=data_collator,
            processing_class=tokenizer,
        )
        self.objective = objective
        self.config = config
        self.lengths = lengths
        # The objective divides by totals of the whole step, so Trainer must not divide once more.
        self.model_accepts_loss_kwargs = True
        self.parts: dict[str, torch.Tensor] = {}
        self.parts_steps = 0
        self.codes = CodeStatistics(objective.student)
        self.add_callback(self.codes)
        self.heldout = heldout
        if heldout is not None:
            self.add_callback(heldout)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        del train_dataset
        batch = self.args.train_batch_size * self.accelerator.num_processes
        self.order = SeededOrder(len(self.train_dataset), self.args.seed, batch, self.lengths)  # type: ignore[arg-type]
        self.add_callback(EpochOrder(self.order))
        return self.order

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The recipe's schedule."""
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer,
            lambda step: learning_rate_factor(self.config, step, num_training_steps),
        )
        return self.lr_scheduler

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | None]:
        """The micro-batches of one optimizer step and the objective's totals over them, all processes included."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not samples:
            return samples, None
        self.parts_steps += 1
        totals = torch.stack([self.objective.counts(batch) for batch in samples]).sum(dim=0).to(device)
        totals = self.accelerator.reduce(totals, reduction="sum")
        return samples, totals.clamp(min=1)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The objective's loss; parts are kept for the log, and a non-finite loss stops the run."""
        del return_outputs
        outputs = model(**inputs, totals=num_items_in_batch)
        loss = outputs["loss"]
        if not torch.isfinite(loss):
            raise TrainingError(self._diverged("loss", loss.item(), self.state.global_step + 1))
        for name, value in outputs.items():
            value = value.detach().float()
            self.parts[name] = self.parts[name] + value if name in self.parts else value
        # DDP averages gradients over processes, the totals are already global.
        return loss * self.accelerator.num_processes

    def _diverged(self, what: str, value: float, step: int) -> str:
        kept = (step - 1) // int(self.args.save_steps) * int(self.args.save_steps)
        return (
            f"the {what} became {value} at step {step}; "
            f"{f'the checkpoint of step {kept} is kept' if kept else 'there is no checkpoint yet'}. "
            f"Lower the learning rate (now {self.config.learning_rate:g}) or max_grad_norm, or set "
            "precision = 'fp32', under another name or after deleting "
            f"{Path(str(self.args.output_dir)).parent}"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss parts, averaged over the steps since the last log, and what the last step did to the codes."""
        if "loss" in logs and self.parts:
            for name, value in self.parts.items():
                total = float(self.accelerator.reduce(value, reduction="sum"))
                logs[name] = round(total / self.parts_steps, 6)
            logs["optim/lr"] = logs.pop("learning_rate")
            logs["optim/grad_norm"] = float(logs.pop("grad_norm", 0.0))
            if not math.isfinite(logs["optim/grad_norm"]):
                raise TrainingError(
                    self._diverged("gradient", logs["optim/grad_norm"], self.state.global_step)
                )
            logs |= self.codes.measure()
            if self.heldout is not None:
                logs |= self.heldout.take()
            self.parts, self.parts_steps = {}, 0
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if state_dict is not None:
            state_dict = {key.removeprefix("student."): value for key, value in state_dict.items()}
        self.objective.student.save_pretrained(output_dir or self.args.output_dir, state_dict=state_dict)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        del model
        student = self.objective.student
        state = load_file(Path(resume_from_checkpoint) / "model.safetensors")
        result = student.load_state_dict(state, strict=False)
        student.tie_weights()
        lost = set(result.missing_keys) - set(student.all_tied_weights_keys) | set(result.unexpected_keys)
        if lost:
            raise CheckpointError(
                f"{resume_from_checkpoint} does not fit the model it should resume ({', '.join(sorted(lost)[:3])}); "
                "delete that folder to resume from an earlier one"
            )


def fit(
    objective: LanguageModelling,
    dataset: Dataset,
    collate: Any,
    config: TrainingConfig,
    *,
    steps: int,
    seed: int,
    work_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
    title: str,
    lengths: list[int] | None = None,
    heldout: HeldoutLoss | None = None,
) -> dict[str, Any]:
    """Train an objective's student in place for ``steps`` optimizer steps, resuming what ``work_dir`` holds.

    Args:
        dataset: items that ``collate`` turns into the objective's keyword arguments.
        work_dir: receives ``metrics.jsonl`` and, until the step is finished, ``trainer/``.
        lengths: tokens of each item, to batch similar lengths together.
        heldout: what computes the held-out losses of the log.

    Returns:
        Metrics of the whole training, time included.

    Raises:
        TrainingError: the loss is not finite.
    """
    hf_logging.set_verbosity_error()
    set_seed(seed)
    trainer_dir = work_dir / "trainer"
    args = TrainingArguments(
        output_dir=str(trainer_dir),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        adam_beta2=config.adam_beta2,
        optim="adamw_torch_fused",
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=2,
        logging_steps=config.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        # Trainer reads this while it is made: setting the field afterwards changes nothing.
        bf16=autocast_dtype(config.precision) is torch.bfloat16,
        use_cpu=not torch.accelerator.is_available(),
        ddp_find_unused_parameters=False,  # the cross-entropy reaches all of them
        report_to="none",
        remove_unused_columns=False,
        seed=seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if args.n_gpu > 1:
        # One process drives one device; DataParallel would scatter the totals and share the teacher's hooks.
        logger.warning("using 1 of %d GPUs; start with accelerate launch or torchrun to use all", args.n_gpu)
        args._n_gpu = 1
    trainer = StudentTrainer(
        objective=objective,
        config=config,
        args=args,
        train_dataset=dataset,
        data_collator=collate,
        tokenizer=tokenizer,
        lengths=lengths,
        heldout=heldout,
    )
    trainer.remove_callback(PrinterCallback)
    metrics_file = MetricsFile(work_dir / "metrics.jsonl")
    trainer.add_callback(StepSchedules(config))
    trainer.add_callback(metrics_file)
    bar = ProgressBar(title)
    trainer.add_callback(bar)
    objective.student.config.use_cache = False
    resume_point = _resume_point(trainer_dir)
    try:
        if resume_point is not None and _steps_done(resume_point) >= steps:
            # Stopped between the last step and the end of this function. Trainer would take one step more.
            trainer._load_from_checkpoint(resume_point)
            metrics_file.reopen(steps, is_writer=trainer.is_world_process_zero())
        else:
            trainer.train(resume_from_checkpoint=resume_point)
    finally:
        bar.progress.stop()  # a live bar hides the cursor
    objective.student.config.use_cache = True
    broken = [n for n, p in objective.student.named_parameters() if not torch.isfinite(p).all()]
    if broken:
        raise TrainingError(
            f"training ended with non-finite weights in {broken[0]}; the step is not finished. "
            f"Lower the learning rate (now {config.learning_rate:g}) and delete {work_dir} to train it again"
        )
    return metrics_file.summary()


def training_settings(config: TrainingConfig) -> dict[str, Any]:
    """A training section as a step's record holds it: with what this machine and its launcher add to the result.

    ``precision`` is the one that computes, not ``auto``; ``processes`` multiplies the global batch.
    """
    compute = "fp32" if autocast_dtype(config.precision) is None else "bf16"
    return to_dict(config) | {"precision": compute, "processes": num_processes()}


def steps_for_tokens(config: TrainingConfig, tokens: int, sequence_length: int, processes: int) -> int:
    """Optimizer steps that a token budget pays for."""
    per_step = config.batch_size * config.gradient_accumulation_steps * sequence_length * processes
    return max(1, math.ceil(tokens / per_step))


def steps_for_epochs(config: TrainingConfig, epochs: float, examples: int, processes: int) -> int:
    """Optimizer steps of ``epochs`` passes over ``examples``."""
    batches = math.ceil(examples / (config.batch_size * processes))
    return max(1, math.ceil(epochs * math.ceil(batches / config.gradient_accumulation_steps)))


def _resume_point(trainer_dir: Path) -> str | None:
    """The last checkpoint that was written to its end and can be opened.

    An incomplete one stays where it is: training comes past its step again and writes over it.
    """
    checkpoints = sorted(trainer_dir.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in reversed(checkpoints):
        if _is_whole(path):
            return str(path)
        logger.warning("%s is incomplete (killed while saving?); using an earlier one", path)
    return None


def _is_whole(checkpoint: Path) -> bool:
    """Whether state, weights and optimizer can be opened."""
    try:
        _steps_done(str(checkpoint))
        with safe_open(checkpoint / "model.safetensors", framework="pt"):
            pass
    except (OSError, ValueError, KeyError, SafetensorError):
        return False
    return zipfile.is_zipfile(checkpoint / "optimizer.pt")


def _steps_done(checkpoint: str) -> int:
    """Optimizer steps that a Trainer checkpoint has behind it."""
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    return int(state["global_step"])
