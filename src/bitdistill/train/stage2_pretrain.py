"""Stage 2, continued pre-training (BitDistill, eq. 7): plain language modelling on general text, masked for an encoder.

``pretrain.lambda_logits`` puts a teacher beside the student, which the paper does in stage 3 only.

The same step trains a refined student, a full-precision control (FP16-CT), and a base made from scratch, which may be
a BitNet.
"""

from collections.abc import Callable
from pathlib import Path

from torch.utils.data import Dataset
from transformers import PretrainedConfig, PreTrainedModel

from ..checkpoint import checkpoint_digest
from ..config import CorpusTrainingConfig, DistillConfig, Recipe
from ..config.checks import check
from ..data.corpus import PackedSequences, Part, build_shards, collate_packed, source_digest
from ..data.masked import MaskedSequences
from ..errors import ConfigError
from ..recipe import to_dict
from .encoder import check_stage_2
from .encoder_objective import MaskedLanguageModelling
from .heldout import HeldoutLoss
from .loading import is_encoder, load_config, load_model, load_tokenizer, save_model
from .native import is_native
from .objective import Distillation, LanguageModelling, Objective
from .step import run_step
from .teacher import check_same_tokenizer
from .trainer import fit, processes_to_keep, steps_for_tokens, training_settings
from .weights import ternary_codes, write_weight_stats


def run(recipe: Recipe, source: str | Path, output_dir: Path) -> Path:
    """Continue the pre-training of ``source`` on the stage-2 part of the corpus; returns the new checkpoint.

    Raises:
        ConfigError: there is no teacher to distill, or no ternary student to distill it into.
        TrainingError: teacher and student have different tokenizers.
    """
    distill = recipe.pretrain.distillation
    if distill is not None and not distill.teacher:
        raise ConfigError(
            "pretrain.teacher is empty: name the teacher of pretrain.lambda_logits (--teacher), such as the "
            "full-precision model that the student was made of"
        )
    return train_on_corpus(recipe, recipe.pretrain, "pretrain", source, output_dir, distill=distill)


def check_teacher(recipe: Recipe, source: str | Path) -> None:
    """Refuse a teacher of stage 2 whose logits are over other tokens; reads tokenizers only.

    Raises:
        TrainingError: the tokenizers differ.
    """
    teacher = recipe.pretrain.teacher
    if teacher:
        tokenizers = (load_tokenizer(model, recipe.revision_of(model)) for model in (source, teacher))
        check_same_tokenizer(*tokenizers)


def train_on_corpus(
    recipe: Recipe,
    config: CorpusTrainingConfig,
    part: Part,
    source: str | Path,
    output_dir: Path,
    *,
    ternarise: Callable[[PreTrainedModel], PreTrainedModel] | None = None,
    distill: DistillConfig | None = None,
) -> Path:
    """Language modelling of ``source`` on one part of the corpus, for ``config.tokens`` tokens.

    ``ternarise``: makes ``source``, a base with random weights, ternary before the first step.
    ``distill``: teacher and losses beside the cross-entropy.
    """
    corpus_digest = source_digest(recipe.corpus)
    processes = processes_to_keep(recipe, output_dir)
    training = training_settings(config, processes)
    own_seed = training.pop("seed", None)
    seed = recipe.seed if own_seed is None else own_seed
    for key in ("lambda_logits", "temperature", "teacher"):
        if distill is None:
            training.pop(key, None)
    if distill is not None:
        training["teacher"] = checkpoint_digest(distill.teacher, recipe.revision_of(distill.teacher))
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
        model_config = load_config(source, recipe.revision_of(source))
        check_stage_2(recipe, source, model_config)
        tokenizer = load_tokenizer(source, recipe.revision_of(source))
        model = load_model(source, recipe.revision_of(source))
        if ternarise is not None:
            model = ternarise(model)
        codes = ternary_codes(model)
        encoder = is_encoder(model.config)
        objective: Objective = MaskedLanguageModelling(model) if encoder else LanguageModelling(model)
        if distill is not None:
            _check_ternary(source, model_config, distill)
            check_teacher(recipe, source)
            teacher = load_model(distill.teacher, recipe.revision_of(distill.teacher))
            objective = Distillation(model, teacher, distill)

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


def _check_ternary(source: str | Path, config: PretrainedConfig, distill: DistillConfig) -> None:
    """The control that FP16-CT is must differ from the student's teacher by the text alone."""
    check(
        is_native(config) or getattr(config, "ternary", None) is not None,
        "pretrain.lambda_logits",
        distill.lambda_logits,
        f"{source} is in full precision, which learns from the text alone; set pretrain.lambda_logits = 0",
    )
