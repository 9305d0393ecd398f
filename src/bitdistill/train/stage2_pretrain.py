"""Stage 2, continued pre-training (BitDistill, eq. 7): plain language modelling on general text, masked for an encoder.

The same step trains a refined student, a full-precision control (FP16-CT), and a base made from scratch, which may be
a native BitNet.
"""

from pathlib import Path

from torch.utils.data import Dataset

from ..checkpoint import checkpoint_digest
from ..config import CorpusTrainingConfig, Recipe
from ..data.corpus import PackedSequences, Part, build_shards, collate_packed, source_digest
from ..data.masked import MaskedSequences
from ..recipe import to_dict
from .encoder import check_stage_2
from .encoder_objective import MaskedLanguageModelling
from .heldout import HeldoutLoss
from .loading import is_encoder, load_config, load_model, load_tokenizer, save_model
from .native import make_native
from .objective import LanguageModelling, Objective
from .step import run_step
from .trainer import fit, processes_to_keep, steps_for_tokens, training_settings
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
    processes = processes_to_keep(recipe, output_dir)
    training = training_settings(config, processes)
    own_seed = training.pop("seed", None)
    seed = recipe.seed if own_seed is None else own_seed
    settings = {
        "stage": "stage2_pretrain",
        "part": part,
        "seed": seed,
        "training": training,
        "corpus": to_dict(recipe.corpus),
        "corpus_digest": corpus_digest,
        "source": checkpoint_digest(source, recipe.revision_of(source)),
    }

    def work(folder: Path) -> dict:
        length = recipe.corpus.sequence_length
        check_stage_2(recipe, source, load_config(source, recipe.revision_of(source)))
        tokenizer = load_tokenizer(source, recipe.revision_of(source))
        model = load_model(source, recipe.revision_of(source))
        if native:
            model = make_native(model)
        codes = ternary_codes(model)
        encoder = is_encoder(model.config)
        objective: Objective = MaskedLanguageModelling(model) if encoder else LanguageModelling(model)

        def sequences(text: Part) -> Dataset:
            shards = build_shards(recipe.corpus, text, tokenizer, recipe.shards_dir, digest=corpus_digest)
            if encoder:
                return MaskedSequences(shards, length, tokenizer, seed)
            return PackedSequences(shards, length)

        dataset = sequences(part)
        steps = steps_for_tokens(config, config.tokens, length, processes)
        heldout = None
        if config.eval_every:
            unseen = sequences("heldout")
            heldout = HeldoutLoss(objective, unseen, length, config.eval_every, config.eval_sequences)
        metrics = fit(
            objective,
            dataset,
            collate_packed,
            config,
            steps=steps,
            seed=seed,
            work_dir=folder,
            tokenizer=tokenizer,
            title=output_dir.name,
            processes=processes,
            heldout=heldout,
        )
        save_model(model, tokenizer, folder)
        write_weight_stats(model, folder, codes)
        return metrics | {"corpus_tokens": len(dataset) * length}

    return run_step(output_dir, settings, work, shared=recipe.shared_steps)
