"""A few real training steps of a tiny model: what tests of the training loop share."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitdistill.config import PretrainConfig
from bitdistill.data.corpus import collate_packed
from bitdistill.train.objective import LanguageModelling
from bitdistill.train.trainer import fit

Weights = dict[str, torch.Tensor]


def weights_of(model: torch.nn.Module) -> Weights:
    """Copies of all parameters, by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, steps: int, **config: object
) -> Weights:
    """The weights after ``steps`` steps of 4 sequences each, at a rate that moves codes; always the same text."""
    ids = torch.randint(2, 300, (32, 12), generator=torch.Generator().manual_seed(5))
    values = {
        "precision": "fp32",
        "batch_size": 4,
        "schedule": "constant",
        "learning_rate": 1e-2,
        "warmup_ratio": 0,
    }
    fit(
        LanguageModelling(model),
        [{"input_ids": row, "labels": row} for row in ids],
        collate_packed,
        PretrainConfig(**values | config),
        steps=steps,
        seed=3,
        work_dir=folder,
        tokenizer=tokenizer,
        title="test",
    )
    return weights_of(model)
