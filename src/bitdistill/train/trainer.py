"""The training loop: ``transformers.Trainer`` with a thin subclass, so that processes, precision, accumulation,
trackers and resume are the ecosystem's.

What is ours: the objective's loss and its totals over an optimizer step, schedules and samples that are functions of
the step, whatever the processes, and a saved checkpoint that is the student alone.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.utils import logging as hf_logging

from ..checkpoint import processes_begun_with
from ..config import Recipe, TrainingConfig
from ..data.masked import MaskedSequences
from ..errors import CheckpointError, TrainingError
from ..processes import from_main_process, num_processes
from ..recipe import to_dict
from .average import weight_average
from .batches import GlobalBatch, SeededOrder, global_batch
from .callbacks import CodeStatistics, MetricsFile, ProgressBar, StepSchedules
from .heldout import HeldoutLoss
from .int4_activations import int4_tail
from .objective import Objective, autocast_dtype
from .parameter_groups import group_factors, split_latents
from .resume import resume_point_of, steps_done
from .sharding import GATHER_FP32, load_optimizer, load_weights, whole

logger = logging.getLogger(__name__)

SHORT_SEQUENCE = 128
"""Longest sequence up to which attention on a CPU is computed without the fused kernel; at 256 neither is faster."""

OPTIONS = (
    "quant_warmup_form",
    "freeze_codes_ratio",
    "freeze_codes_lr",
    "int4_activations_ratio",
    "ema_decay",
    "hadamard_block",
)
"""Keys that a step's record holds only where they are not at their defaults: a step made before there was such a key is
still the same step."""


class StudentTrainer(Trainer):
    """Trainer of an objective; what it saves and loads is the student inside."""

    def __init__(
        self,
        *,
        objective: Objective,
        config: TrainingConfig,
        args: TrainingArguments,
        train_dataset: Dataset,
        data_collator: Any,
        tokenizer: PreTrainedTokenizerBase,
        batch: GlobalBatch,
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
        self.batch = batch
        self.lengths = lengths
        # The objective divides by totals of the whole step, so Trainer must not divide once more.
        self.model_accepts_loss_kwargs = True
        self.parts: dict[str, torch.Tensor] = {}
        self.parts_steps = 0
        self.codes = CodeStatistics(objective.student)
        self.add_callback(self.codes)
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = GATHER_FP32
            # Gradients that wait for the last micro-batch wait whole, on every process.
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
            objective.shard_teacher()
        self.average = weight_average(objective.student, config.ema_decay, sharded=self.is_fsdp_enabled)
        if self.average is not None:
            self.add_callback(self.average)
        self.heldout = heldout
        if heldout is not None:
            heldout.judged = self.average.in_place if self.average is not None else nullcontext
            self.add_callback(heldout)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        """One epoch of Trainer's is the whole training, so every step is full and a resume skips whole steps."""
        del train_dataset
        return SeededOrder(
            len(self.train_dataset),  # type: ignore[arg-type]
            self.args.seed,
            batch_size=self.batch.size,
            steps=self.args.max_steps,
            lengths=self.lengths,
            numbered=isinstance(self.train_dataset, MaskedSequences),
        )

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Trainer's, without learned scales: a scale decays no weight, it moves all thresholds of its matrix."""
        return [n for n in super().get_decay_parameter_names(model) if not n.endswith(".weight_scale")]

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's, whose group of norms and biases has no weight decay and is marked to stay that way."""
        optimizer = super().create_optimizer(model)
        for group in optimizer.param_groups:
            group["decays"] = group["weight_decay"] > 0
        if self.config.freeze_codes_ratio:
            split_latents(optimizer, self.objective)
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The recipe's schedule, for each group of parameters."""
        optimizer = optimizer or self.optimizer
        factors = group_factors(optimizer, self.config, num_training_steps)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
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
        with self._autocast():
            outputs = model(**inputs, totals=num_items_in_batch)
        loss = outputs["loss"]
        if not torch.isfinite(loss):
            raise TrainingError(self._diverged("loss", loss.item(), self.state.global_step + 1))
        for name, value in outputs.items():
            value = value.detach().float()
            self.parts[name] = self.parts[name] + value if name in self.parts else value
        # DDP and FSDP2 average gradients over processes, the totals are already global.
        return loss * self.accelerator.num_processes

    def _autocast(self) -> AbstractContextManager:
        """For FSDP2 accelerate leaves precision to the dtype that is gathered, which stays fp32 here.

        Without its cache, which would keep the bf16 copy of every layer that has been resharded.
        """
        if not (self.is_fsdp_enabled and self.args.bf16):
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, cache_enabled=False)

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
            # Trainer takes the whole training for one epoch; here it is a pass over the data.
            self.state.epoch = self.state.global_step * self.batch.size / len(self.train_dataset)  # type: ignore[arg-type]
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
        del state_dict
        folder = output_dir or self.args.output_dir
        self.objective.student.save_pretrained(folder)
        if self.average is not None:
            self.average.save(Path(folder))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        del model
        student = self.objective.student
        differing = load_weights(self.objective, Path(resume_from_checkpoint))
        student.tie_weights()
        lost = {name.removeprefix("student.") for name in differing} - set(student.all_tied_weights_keys)
        if lost:
            raise CheckpointError(
                f"{resume_from_checkpoint} does not fit the model it should resume ({', '.join(sorted(lost)[:3])}); "
                "delete that folder to resume from an earlier one"
            )
        if self.average is not None:
            self.average.load(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        load_optimizer(self.model_wrapped, self.optimizer, folder)
        self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))


def fit(
    objective: Objective,
    dataset: Dataset,
    collate: Any,
    config: TrainingConfig,
    *,
    steps: int,
    seed: int,
    work_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
    title: str,
    processes: int | None = None,
    lengths: list[int] | None = None,
    heldout: HeldoutLoss | None = None,
) -> dict[str, Any]:
    """Train an objective's student in place for ``steps`` optimizer steps, resuming what ``work_dir`` holds.

    Args:
        dataset: items that ``collate`` turns into the objective's keyword arguments.
        work_dir: receives ``metrics.jsonl`` and, until the step is finished, ``trainer/``.
        processes: those whose global batch this keeps, however many there are now; None: these.
        lengths: tokens of each item, to batch similar lengths together.
        heldout: what computes the held-out losses of the log.

    Returns:
        Metrics of the whole training, time included.

    Raises:
        TrainingError: the loss is not finite, the processes cannot share the global batch, or the student has no use
            for ``int4_activations_ratio``.
    """
    now = num_processes()
    batch = from_main_process(lambda: global_batch(config, processes or now, now))
    if now != (processes or now):
        logger.info(
            "%s keeps its global batch of %d sequences: %d processes, %d micro-batches of %d on each",
            title, batch.size, batch.processes, batch.accumulation, batch.batch_size,
        )  # fmt: skip
    hf_logging.set_verbosity_error()
    set_seed(seed)
    trainer_dir = work_dir / "trainer"
    args = TrainingArguments(
        output_dir=str(trainer_dir),
        max_steps=steps,
        per_device_train_batch_size=batch.batch_size,
        gradient_accumulation_steps=batch.accumulation,
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
    # accelerate launch has a precision of its own; the recipe's is the one that is recorded.
    args.mixed_precision = "bf16" if args.bf16 else "no"
    if config.gradient_checkpointing:
        objective.recompute_layers()
    trainer = StudentTrainer(
        objective=objective,
        config=config,
        args=args,
        train_dataset=dataset,
        data_collator=collate,
        tokenizer=tokenizer,
        batch=batch,
        lengths=lengths,
        heldout=heldout,
    )
    trainer.remove_callback(PrinterCallback)
    metrics_file = MetricsFile(work_dir / "metrics.jsonl")
    trainer.add_callback(StepSchedules(config))
    int4 = int4_tail(objective.student, config)
    if int4 is not None:
        trainer.add_callback(int4)
    trainer.add_callback(metrics_file)
    bar = ProgressBar(title)
    trainer.add_callback(bar)
    objective.student.config.use_cache = False
    resume_point = resume_point_of(trainer_dir)
    try:
        if resume_point is not None and steps_done(resume_point) >= steps:
            # Stopped between the last step and the end of this function. Trainer would take one step more.
            trainer._load_from_checkpoint(resume_point)
            metrics_file.reopen(steps, is_writer=trainer.is_world_process_zero())
        else:
            with _attention(args, lengths):
                trainer.train(resume_from_checkpoint=resume_point)
    finally:
        bar.progress.stop()  # a live bar hides the cursor
    objective.student.config.use_cache = True
    if int4 is not None:
        int4.finish()
    if trainer.average is not None:
        trainer.average.finish()
    broken = [n for n, p in objective.student.named_parameters() if not whole(torch.isfinite(p).all())]
    if broken:
        raise TrainingError(
            f"training ended with non-finite weights in {broken[0]}; the step is not finished. "
            f"Lower the learning rate (now {config.learning_rate:g}) and delete {work_dir} to train it again"
        )
    return metrics_file.summary()


def _attention(args: TrainingArguments, lengths: list[int] | None) -> AbstractContextManager:
    """On a CPU the backward pass of fused attention costs short sequences a quarter of a step: plain products there."""
    if args.use_cpu and lengths and max(lengths) <= SHORT_SEQUENCE:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def processes_to_keep(recipe: Recipe, output_dir: Path) -> int:
    """Processes whose global batch the step at ``output_dir`` keeps: those that it or its run began with, or these."""
    now = num_processes()
    return from_main_process(lambda: processes_begun_with(output_dir, recipe.run_dir) or now)


def training_settings(config: TrainingConfig, processes: int | None = None) -> dict[str, Any]:
    """A training section as a step's record holds it: with what this machine and its launcher add to the result.

    ``precision`` is the one that computes, not ``auto``; ``processes`` (None: these) multiplies the global batch. What
    changes no result is not there, nor are OPTIONS at their defaults.
    """
    compute = "fp32" if autocast_dtype(config.precision) is None else "bf16"
    settings = to_dict(config) | {"precision": compute, "processes": processes or num_processes()}
    del settings["gradient_checkpointing"]
    return {key: v for key, v in settings.items() if key not in OPTIONS or v != getattr(type(config), key)}


def steps_for_tokens(config: TrainingConfig, tokens: int, sequence_length: int, processes: int) -> int:
    """Optimizer steps that a token budget pays for."""
    return _steps(config, math.ceil(tokens / sequence_length), processes)


def steps_for_epochs(config: TrainingConfig, epochs: float, examples: int, processes: int) -> int:
    """Optimizer steps of ``epochs`` passes over ``examples``."""
    return _steps(config, round(epochs * examples), processes)


def _steps(config: TrainingConfig, sequences: int, processes: int) -> int:
    per_step = config.batch_size * config.gradient_accumulation_steps * processes
    return max(1, math.ceil(sequences / per_step))
