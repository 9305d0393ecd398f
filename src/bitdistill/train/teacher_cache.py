"""The teacher cache of stage 3: what a teacher says of every training example, computed once and kept on disk.

A cache is a step of its own: a folder with ``run.json``, its shards (``data/teacher_rows.py``) and, for hidden states,
the teacher's output head. Its settings are digests of the teacher, the tokenizer and the encoded examples, and what is
kept; a run whose settings differ gets another folder, or an error where it named this one.

Every process fills the shards whose number is its own modulo the number of processes. A shard is a function of the
settings alone, so filling goes on at any shard, on any number of processes.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint import RUN_FILE, checkpoint_digest, differences, digest_of, read_run
from ..config import DistillConfig, Recipe
from ..data.corpus import tokenizer_digest
from ..data.progress import TokensProgress
from ..data.prompts import PaddedBatch, TaskSequences
from ..data.teacher_rows import (
    RowPlan,
    Rows,
    TaughtSequences,
    damaged_cache,
    examples_digest,
    shard_fault,
    shard_path,
    write_shard,
)
from ..errors import CheckpointError, TrainingError
from ..processes import is_main_process, num_processes, on_main_process, process_state
from .head_loss import BLOCK_TOKENS, block_linear
from .loading import load_config, load_model
from .losses import top_k_log_p
from .objective import autocast_dtype, kd_mask, layer_pairs
from .step import run_step
from .taps import attention_layers, run_tapped
from .teacher import CachedTeacher

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of what the shards hold."""

BATCH_TOKENS = 4096
"""Tokens, padding included, of a forward pass while filling. Not a setting: rounding depends on it."""

HEAD_FILE = "head.safetensors"

LITTLE_MASS = 0.9
"""Share of the teacher's mass below which a top-k cache is warned of."""


def cached_teacher(
    recipe: Recipe, source: str | Path, tokenizer: PreTrainedTokenizerBase, sequences: TaskSequences
) -> tuple[CachedTeacher, TaughtSequences]:
    """The teacher of ``recipe.distill`` for a student like ``source``, from its cache, which is filled if need be.

    Returns:
        The teacher, and the training sequences with its part in them.

    Raises:
        CheckpointError: the cache is damaged, or ``distill.teacher_cache_dir`` holds another one.
        TrainingError: a layer or an entry of the vocabulary is asked for that a model does not have.
    """
    config = recipe.distill
    configs = (
        load_config(source, recipe.revision_of(source)),
        load_config(config.teacher, config.teacher_revision),
    )
    depths = [int(c.num_hidden_layers) for c in configs]
    layers = sorted({layer for _, layer in layer_pairs(config, *depths)})
    vocab_size = min(int(c.vocab_size) for c in configs)
    if config.teacher_cache == "topk" and config.cache_top_k > vocab_size:
        raise TrainingError(
            f"distill.cache_top_k = {config.cache_top_k}: the models share {vocab_size} entries of the vocabulary; use "
            'at most so many, or teacher_cache = "hidden"'
        )
    settings = _settings(config, tokenizer, sequences, layers, vocab_size)
    plan = RowPlan(sequences, config.kd_tokens)
    filler = CacheFiller(config, plan, tokenizer.pad_token_id, layers, vocab_size)
    folder = _folder(recipe, settings)
    if not (folder / RUN_FILE).is_file():
        folder = run_step(folder, settings, filler.fill, progress="shard-*")
    on_main_process(lambda: filler.check(folder))
    head = load_head(folder) if filler.form == "hidden" else None
    teacher = CachedTeacher(head, int(configs[1].vocab_size), depths[1], config.temperature)
    taught = TaughtSequences(plan, folder, filler.names)
    if filler.form == "topk" and is_main_process():
        _warn_of_little_mass(taught, config)
    return teacher, taught


def _warn_of_little_mass(taught: TaughtSequences, config: DistillConfig) -> None:
    rest = torch.cat([rows["teacher_rest_log_p"] for rows in taught.shards]).exp().mean().item()
    if 1 - rest < LITTLE_MASS:
        logger.warning(
            "the %d likeliest tokens hold %.1f %% of the teacher's mass at temperature %g, and the logits KD sees "
            'little beside them: use teacher_cache = "hidden", a larger cache_top_k or a lower temperature',
            config.cache_top_k, 100 * (1 - rest), config.temperature,
        )  # fmt: skip


def _settings(
    config: DistillConfig,
    tokenizer: PreTrainedTokenizerBase,
    sequences: TaskSequences,
    layers: list[int],
    vocab_size: int,
) -> dict[str, Any]:
    """What decides every byte of a cache; None for a part that it need not hold."""
    logits: dict[str, Any] | None = None
    if config.lambda_logits:
        logits = {"form": config.teacher_cache, "kd_tokens": config.kd_tokens}
        if config.teacher_cache == "topk":
            logits |= {
                "cache_top_k": config.cache_top_k,
                "temperature": config.temperature,
                "vocab_size": vocab_size,
            }
    return {
        "stage": "teacher_cache",
        "format": FORMAT,
        "teacher": checkpoint_digest(config.teacher, config.teacher_revision),
        "tokenizer": tokenizer_digest(tokenizer),
        "examples": examples_digest(sequences),
        "precision": "fp32" if autocast_dtype(config.precision) is None else "bf16",
        "logits": logits,
        "relations": {"layers": layers, "states": config.relation_states} if layers else None,
    }


def _missing(there: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What is wanted of a cache and not so there; it may hold a part that is not wanted."""
    asked = {key: value for key, value in wanted.items() if value is not None}
    return sorted(differences({key: there.get(key) for key in asked}, asked))


def _folder(recipe: Recipe, settings: dict[str, Any]) -> Path:
    """The cache to use or to fill: the one that the recipe names, else one of the run that holds what is wanted."""
    named = recipe.distill.teacher_cache_dir
    if named:
        on_main_process(lambda: _refuse_another(Path(named), settings))
        return Path(named)
    for folder in finished_caches(recipe.run_dir):
        if not _missing(read_run(folder)["settings"], settings):
            return folder
    return recipe.run_dir / f"teacher-cache-{digest_of(settings)}"


def finished_caches(run_dir: Path) -> list[Path]:
    """The teacher caches of a run."""
    folders = sorted(record.parent for record in run_dir.glob(f"teacher-cache-*/{RUN_FILE}"))
    return [folder for folder in folders if folder.suffix != ".partial"]


def _refuse_another(folder: Path, settings: dict[str, Any]) -> None:
    for place in (folder, folder.with_name(f"{folder.name}.partial")):
        if (place / RUN_FILE).is_file() and (missing := _missing(read_run(place)["settings"], settings)):
            raise CheckpointError(
                f"{place}: this teacher cache does not match ({'; '.join(missing)}). Nothing was changed. Leave "
                "distill.teacher_cache_dir out for a cache of the run's own, name another folder, or delete this one"
            )


class CacheFiller:
    """What a cache holds for a ``[distill]`` section, and how it is filled and checked.

    Args:
        layers: the teacher's, of the relation KD.
        vocab_size: entries that student and teacher share.
    """

    def __init__(
        self,
        config: DistillConfig,
        plan: RowPlan,
        pad_id: int,
        layers: list[int],
        vocab_size: int,
    ) -> None:
        self.config, self.plan, self.layers, self.vocab_size = config, plan, layers, vocab_size
        self.padded = PaddedBatch(pad_id)
        self.form = config.teacher_cache if config.lambda_logits else ""
        self.compute_dtype = autocast_dtype(config.precision)
        tensors = {"hidden": ["hidden"], "topk": ["top", "top_log_p", "rest_log_p"], "": []}[self.form]
        tensors += [f"{letter}.{layer}" for layer in layers for letter in "qkv"]
        self.names = [f"teacher_{name}" for name in tensors]

    def check(self, folder: Path) -> None:
        """Read all shards once.

        Raises:
            CheckpointError: one is missing or damaged.
        """
        for shard, counts in enumerate(self.plan.counts):
            path = shard_path(folder, shard)
            if fault := shard_fault(path, counts, self.names):
                raise damaged_cache(path, fault)

    def fill(self, folder: Path) -> dict[str, Any]:
        """Write this process's shards that are not there yet; returns the metrics of the whole cache."""
        state = process_state()
        shards = range(state.process_index, len(self.plan.shards), num_processes())
        todo = [s for s in shards if shard_fault(shard_path(folder, s), self.plan.counts[s], self.names)]
        # A kill may have come between the last shard and the record: then there is nothing to compute.
        if todo or (self.form == "hidden" and not (folder / HEAD_FILE).is_file()):
            model = load_model(self.config.teacher, self.config.teacher_revision).eval().requires_grad_(False)
            if state.is_main_process:
                self._announce(model, folder)
                if self.form == "hidden":
                    _save_head(model.get_output_embeddings(), folder, self.compute_dtype)
            self._write_shards(model.to(state.device), todo, folder)
        kd_tokens, tokens = (sum(counts) for counts in zip(*self.plan.counts, strict=True))
        return {
            "examples": len(self.plan.sequences),
            "tokens": tokens,
            "kd_tokens": kd_tokens if self.form else 0,
            "shards": len(self.plan.shards),
        }

    def _announce(self, model: PreTrainedModel, folder: Path) -> None:
        """Say what disk the shards that are still missing need.

        Raises:
            CheckpointError: there is less.
        """
        row_bytes = self._row_bytes(model)
        need = sum(
            count * size
            for shard, counts in enumerate(self.plan.counts)
            if not shard_path(folder, shard).is_file()
            for count, size in zip(counts, row_bytes, strict=True)
        )
        if self.form == "hidden":
            need += (
                model.get_output_embeddings().weight.numel() * (self.compute_dtype or torch.float32).itemsize
            )
        free = shutil.disk_usage(folder).free
        logger.info(
            "teacher cache in %s: %.3f GB to write (%d bytes per KD token, %d per token), %.1f GB free",
            folder, need / 1e9, *row_bytes, free / 1e9,
        )  # fmt: skip
        if need > free:
            raise CheckpointError(
                f"{folder}: the teacher cache takes {need / 1e9:.3f} GB more and the disk has {free / 1e9:.3f} GB "
                "free; name a folder on another disk (distill.teacher_cache_dir), or keep less: teacher_cache = "
                '"topk", kd_tokens = "response", fewer relation_layers'
            )

    def _row_bytes(self, model: PreTrainedModel) -> tuple[int, int]:
        """Bytes of a KD token and of a real token."""
        hidden = model.get_output_embeddings().weight.shape[1] * 2
        kd = {"hidden": hidden, "topk": self.config.cache_top_k * (4 + 2) + 4, "": 0}[self.form]
        modules = attention_layers(model)
        widths = [
            getattr(modules[layer], f"{x}_proj").weight.shape[0] for layer in self.layers for x in "qkv"
        ]
        return kd, 2 * sum(widths)

    def _write_shards(self, model: PreTrainedModel, todo: list[int], folder: Path) -> None:
        state = process_state()
        total = sum(self.plan.counts[shard][1] for shard in todo)
        autocast = torch.autocast(
            state.device.type, dtype=torch.bfloat16, enabled=self.compute_dtype is not None
        )
        with TokensProgress("teacher cache", total, shown=state.is_main_process) as progress:
            for shard in todo:
                parts: list[Rows] = []
                for indices in self.plan.batches(shard, BATCH_TOKENS):
                    batch = self.padded([self.plan.sequences[index] for index in indices])
                    with torch.no_grad(), autocast:
                        parts.append(self._rows(model, {k: v.to(state.device) for k, v in batch.items()}))
                    progress.advance(int(batch["attention_mask"].sum()))
                rows = {name: torch.cat([part[name] for part in parts]) for name in self.names}
                _check_finite(rows, self.config.teacher)
                write_shard(shard_path(folder, shard), rows)

    def _rows(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> Rows:
        """The rows of a padded batch, example after example."""
        config = self.config
        hidden, states = run_tapped(model, batch, tuple(self.layers), config.relation_states)
        found = {}
        if self.form:
            hidden = hidden[kd_mask(config.kd_tokens, batch["labels"], batch["attention_mask"])]
        if self.form == "hidden":
            found["hidden"] = hidden.bfloat16()
        elif self.form == "topk":
            names = ("top", "top_log_p", "rest_log_p")
            found |= zip(names, self._top_k(hidden, model.get_output_embeddings()), strict=True)
        real = batch["attention_mask"].bool()
        for layer in self.layers:
            for letter, state in zip("qkv", states[layer], strict=True):
                found[f"{letter}.{layer}"] = state.transpose(1, 2)[real].bfloat16()
        return {f"teacher_{name}": tensor.cpu() for name, tensor in found.items()}

    def _top_k(self, hidden_NE: Tensor, head: nn.Module) -> tuple[Tensor, ...]:
        logits_of = block_linear(head)
        blocks = [
            top_k_log_p(
                logits_of(block)[:, : self.vocab_size],
                self.config.cache_top_k,
                temperature=self.config.temperature,
            )
            for block in hidden_NE.split(BLOCK_TOKENS)
        ]
        top, log_p, rest = (torch.cat(part) for part in zip(*blocks, strict=True))
        return top.int(), log_p.clamp(min=torch.finfo(torch.float16).min).half(), rest.float()


def _check_finite(rows: Rows, teacher: str) -> None:
    for name, tensor in rows.items():
        if not tensor.isfinite().all():
            raise TrainingError(
                f"{teacher}: its {name.removeprefix('teacher_')} is not finite on the training data, so there is "
                "nothing to learn from it; set distill.precision = 'fp32' or use another teacher"
            )


def _save_head(head: nn.Module, folder: Path, compute_dtype: torch.dtype | None) -> None:
    """The output head in the dtype that it computes in, which autocast would cast it to."""
    tensors = {
        name: tensor.detach().to(compute_dtype or tensor.dtype).contiguous()
        for name, tensor in (("weight", head.weight), ("bias", head.bias))
        if tensor is not None
    }
    temporary = folder / f".{HEAD_FILE}.tmp"
    try:
        save_file(tensors, temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(folder / HEAD_FILE)


def load_head(folder: Path) -> nn.Linear:
    """The teacher's output head without its body."""
    path = folder / HEAD_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise damaged_cache(path, str(error)) from error
    weight = tensors["weight"]
    head = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in tensors, device="meta")
    head.load_state_dict(tensors, assign=True)
    return head.requires_grad_(False)
