"""Stage 1, modelling refinement (BitDistill, eq. 4-5): ternary linears, and SubLN before the output projections.

No gradient step is taken; the next stages train what this one builds.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..checkpoint import checkpoint_digest
from ..config import Recipe, RefineConfig
from ..data.corpus import PackedSequences, build_shards, collate_packed, source_digest
from ..data.masked import FramedSequences
from ..model import TernarySpec
from ..processes import is_main_process, process_state
from ..recipe import to_dict
from .encoder import check_positions
from .loading import check_family, is_encoder, load_model, load_tokenizer, save_model
from .step import run_step
from .surgery import refine
from .weights import write_weight_stats

CALIBRATION_BATCH = 8


def run(recipe: Recipe, source: str | Path, output_dir: Path) -> Path:
    """Convert ``source`` into a student; returns its checkpoint, with ``surgery.txt`` inside."""
    config = recipe.refine
    settings: dict[str, Any] = {
        "stage": "stage1_refine",
        "refine": to_dict(config),
        "source": checkpoint_digest(source, recipe.revision_of(source)),
    }
    if not config.dead_zone_bias:
        del settings["refine"]["dead_zone_bias"]  # a step made before there was such a key is the same step
    corpus_digest = source_digest(recipe.corpus) if config.gain == "rms" else ""
    if corpus_digest:
        settings["calibration"] = to_dict(recipe.corpus) | {"digest": corpus_digest}

    def work(folder: Path) -> dict:
        check_family(source, recipe.revision_of(source))
        tokenizer = load_tokenizer(source, recipe.revision_of(source))
        model = load_model(source, recipe.revision_of(source)).to(process_state().device)
        if corpus_digest:
            check_positions(model.config, "corpus.sequence_length", recipe.corpus.sequence_length)
        framed = is_encoder(model.config)
        calibration = (
            _calibration_batches(recipe, tokenizer, corpus_digest, framed) if corpus_digest else None
        )
        student, report = refine(model, ternary_spec(config), calibration)
        if is_main_process():
            (folder / "surgery.txt").write_text(f"{report}\n", encoding="utf-8")
        write_weight_stats(student, folder)
        save_model(student, tokenizer, folder)
        return {
            "linears_replaced": len(report.replaced),
            "linears_skipped": len(report.skipped),
            "parameters": report.after.parameters,
            "bytes_before": report.before.bytes,
            "bytes_after": report.after.bytes,
        }

    return run_step(output_dir, settings, work, shared=recipe.shared_steps)


def ternary_spec(config: RefineConfig) -> TernarySpec:
    """What the section makes of a model."""
    return TernarySpec(
        norm_sites=config.norm_sites,
        granularity=config.granularity,
        block_size=config.block_size,
        activation_bits=config.activation_bits,
        skip=config.skip,
        dead_zone_bias=config.dead_zone_bias,
    )


def _calibration_batches(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, corpus_digest: str, framed: bool
) -> Iterator[dict[str, Tensor]]:
    """The first ``calibration_sequences`` sequences of the stage-2 text, with ``[CLS]`` and ``[SEP]`` if ``framed``."""
    shards = build_shards(recipe.corpus, "pretrain", tokenizer, recipe.shards_dir, digest=corpus_digest)
    length = recipe.corpus.sequence_length
    dataset = FramedSequences(shards, length, tokenizer) if framed else PackedSequences(shards, length)
    count = min(recipe.refine.calibration_sequences, len(dataset))
    for start in range(0, count, CALIBRATION_BATCH):
        items = [dataset[i] for i in range(start, min(start + CALIBRATION_BATCH, count))]
        batch = collate_packed(items)
        yield {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["input_ids"])}
