"""Stage 2, continued pre-training (BitDistill, eq. 7): plain language modelling on general text.

The same step trains a refined student, a full-precision control (FP16-CT), and a base made from scratch, which may be
a native BitNet.
"""

from pathlib import Path

from ..checkpoint import checkpoint_digest
from ..config import CorpusTrainingConfig, Recipe
from ..data.corpus import PackedSequences, Part, build_shards, collate_packed, source_digest
from ..processes import num_processes
from ..recipe import to_dict
from .heldout import HeldoutLoss
from .loading import load_model, load_tokenizer, save_model
from .native import make_native
from .objective import LanguageModelling
from .step import run_step
from .trainer import fit, steps_for_tokens, training_settings
from .weights import ternary_codes, write_weight_stats


def run(recipe: Recipe, source: str | Path, output_dir: Path) -> Path:
    """Continue the pre-training of ``source`` on the stage-2 part of the corpus; returns the new checkpoint."""
    return train_on_corpus(recipe, recipe.pretrain, "pretrain", source, output_dir)


def train_on_corpus(
    recipe: Recipe,
    config: CorpusTrainingConfig,
    part: Part,
    source: str | Path,
    output_dir: Path,
    *,
    native: bool = False,
) -> Path:
    """Language modelling of ``source`` on one part of the corpus, for ``config.tokens`` tokens.

    ``native``: ``source`` is a full-precision BitNet, whose linears are made ternary before the first step.
    """
    corpus_digest = source_digest(recipe.corpus)
    settings = {
        "stage": "stage2_pretrain",
        "part": part,
        "seed": recipe.seed,
        "training": training_settings(config),
        "corpus": to_dict(recipe.corpus),
        "corpus_digest": corpus_digest,
        "source": checkpoint_digest(source, recipe.revision_of(source)),
    }

    def work(folder: Path) -> dict:
        tokenizer = load_tokenizer(source, recipe.revision_of(source))
        model = load_model(source, recipe.revision_of(source))
        if native:
            model = make_native(model)
        codes = ternary_codes(model)
        shards = build_shards(recipe.corpus, part, tokenizer, recipe.run_dir / "shards", digest=corpus_digest)
        dataset = PackedSequences(shards, recipe.corpus.sequence_length)
        steps = steps_for_tokens(config, config.tokens, recipe.corpus.sequence_length, num_processes())
        objective = LanguageModelling(model)
        heldout = None
        if config.eval_every:
            unseen = build_shards(
                recipe.corpus, "heldout", tokenizer, recipe.run_dir / "shards", digest=corpus_digest
            )
            sequences = PackedSequences(unseen, recipe.corpus.sequence_length)
            heldout = HeldoutLoss(objective, sequences, config.eval_every, config.eval_sequences)
        metrics = fit(
            objective,
            dataset,
            collate_packed,
            config,
            steps=steps,
            seed=recipe.seed,
            work_dir=folder,
            tokenizer=tokenizer,
            title=output_dir.name,
            heldout=heldout,
        )
        save_model(model, tokenizer, folder)
        write_weight_stats(model, folder, codes)
        return metrics | {"corpus_tokens": len(dataset) * recipe.corpus.sequence_length}

    return run_step(output_dir, settings, work)
