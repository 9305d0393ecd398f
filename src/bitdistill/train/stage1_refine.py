"""Stage 1, modelling refinement (BitDistill, eq. 4-5): ternary linears, and SubLN before the output projections.

No gradient step is taken; the next stages train what this one builds, from the model's own weights or from those that
GPTQ or AWQ find.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint import checkpoint_digest
from ..config import Recipe, RefineConfig
from ..data.corpus import source_digest
from ..model import HADAMARD_SITES, TernarySpec
from ..processes import is_main_process, process_state
from ..recipe import to_dict
from .calibration import calibration_batches
from .encoder import check_positions
from .initialisation import check_initialisation, initialise
from .loading import check_family, is_encoder, load_config, load_model, load_tokenizer, save_model
from .step import run_step
from .surgery import refine
from .weights import write_weight_stats


def run(recipe: Recipe, source: str | Path, output_dir: Path) -> Path:
    """Convert ``source`` into a student; returns its checkpoint, with ``surgery.txt`` inside."""
    config = recipe.refine
    settings: dict[str, Any] = {
        "stage": "stage1_refine",
        "refine": to_dict(config),
        "source": checkpoint_digest(source, recipe.revision_of(source)),
    }
    for key in ("dead_zone_bias", "hadamard", "hadamard_block", "hadamard_fold"):
        if getattr(config, key) == getattr(RefineConfig, key):
            del settings["refine"][key]  # a step made before there was such a key is the same step
    corpus_digest = source_digest(recipe.corpus) if config.is_calibrated else ""
    if corpus_digest:
        settings["calibration"] = to_dict(recipe.corpus) | {"digest": corpus_digest}

    def work(folder: Path) -> dict:
        check_family(source, recipe.revision_of(source))
        check_initialisation(load_config(source, recipe.revision_of(source)).model_type, config)
        tokenizer = load_tokenizer(source, recipe.revision_of(source))
        model = load_model(source, recipe.revision_of(source)).to(process_state().device)
        if corpus_digest:
            check_positions(model.config, "corpus.sequence_length", recipe.corpus.sequence_length)
        calibration = None
        if corpus_digest:
            calibration = calibration_batches(recipe, tokenizer, corpus_digest, is_encoder(model.config))
        gains = calibration if config.gain == "rms" else None
        student, report = refine(model, ternary_spec(config), gains, fold=config.hadamard_fold)
        errors = {}
        if calibration is not None:
            findings = initialise(student.to(process_state().device), calibration, config)
            report = replace(report, findings=findings)
            absmean, chosen = findings.means
            errors = {"output_error_absmean": absmean, "output_error": chosen}
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
            **errors,
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
        scale=config.scale,
        dead_zone_bias=config.dead_zone_bias,
        hadamard=dict.fromkeys(HADAMARD_SITES if config.hadamard == "outputs" else (), config.hadamard_block),
    )
