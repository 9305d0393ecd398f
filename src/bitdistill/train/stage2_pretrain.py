"""Stage 2, continued pre-training (BitDistill, eq. 7): plain language modelling on general text.

The same step trains a refined student, a full-precision control (FP16-CT), and a base made from scratch.
"""

from pathlib import Path

from ..checkpoint import checkpoint_digest
from ..config import BaseConfig, PretrainConfig, Recipe
from ..data.corpus import PackedSequences, Part, build_shards, collate_packed, source_digest
from ..recipe import to_dict
from .loading import load_model, load_tokenizer, save_model
from .objective import LanguageModelling
from .step import run_step
from .trainer import fit, processes_to_keep, steps_for_tokens, training_settings
from .weights import ternary_codes, write_weight_stats


def run(recipe: Recipe, source: str | Path, output_dir: Path) -> Path:
    """Continue the pre-training of ``source`` on the stage-2 part of the corpus; returns the new checkpoint."""
    return train_on_corpus(recipe, recipe.pretrain, "pretrain", source, output_dir)


def train_on_corpus(
    recipe: Recipe,
    config: PretrainConfig | BaseConfig,
    part: Part,
    source: str | Path,
    output_dir: Path,
) -> Path:
    """Language modelling of ``source`` on one part of the corpus, for ``config.tokens`` tokens."""
    corpus_digest = source_digest(recipe.corpus)
    processes = processes_to_keep(recipe, output_dir)
    settings = {
        "stage": "stage2_pretrain",
        "part": part,
        "seed": recipe.seed,
        "training": training_settings(config, processes),
        "corpus": to_dict(recipe.corpus),
        "corpus_digest": corpus_digest,
        "source": checkpoint_digest(source, recipe.revision_of(source)),
    }

    def work(folder: Path) -> dict:
        tokenizer = load_tokenizer(source, recipe.revision_of(source))
        model = load_model(source, recipe.revision_of(source))
        codes = ternary_codes(model)
        shards = build_shards(recipe.corpus, part, tokenizer, recipe.run_dir / "shards", digest=corpus_digest)
        dataset = PackedSequences(shards, recipe.corpus.sequence_length)
        steps = steps_for_tokens(config, config.tokens, recipe.corpus.sequence_length, processes)
        metrics = fit(
            LanguageModelling(model),
            dataset,
            collate_packed,
            config,
            steps=steps,
            seed=recipe.seed,
            work_dir=folder,
            tokenizer=tokenizer,
            title=output_dir.name,
            processes=processes,
        )
        save_model(model, tokenizer, folder)
        write_weight_stats(model, folder, codes)
        return metrics | {"corpus_tokens": len(dataset) * recipe.corpus.sequence_length}

    return run_step(output_dir, settings, work)
