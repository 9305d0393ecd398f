"""What a training step of an encoder computes; see ``objective.py``.

    MaskedLanguageModelling   CE of the masked tokens                            stage 2
    Classification            CE of the classes                                  every plain fine-tune
    ClassDistillation         CE + lambda * KD of the classes + gamma * relation KD    stage 3 (eq. 13)

Classes take the place of the tokens that a decoder predicts, so N of eq. 9 is the number of examples.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.prompts import IGNORE_INDEX
from ..errors import TrainingError
from ..model import family_of
from .losses import cross_entropy, label_loss, logits_kd
from .objective import Distillation, Objective
from .taps import States, capture

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class MaskedLanguageModelling(Objective):
    """Cross-entropy of the masked tokens: stage 2 of an encoder."""

    def __init__(self, student: PreTrainedModel) -> None:
        super().__init__(student)
        family = family_of(student.config.model_type)
        if family is None or student.get_output_embeddings() is None:
            raise TrainingError(f"{type(student).__name__} has no masked-LM head to train")
        self.transform = family.head_transform

    def counts(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Masked tokens, int64 ``[1]``."""
        return (batch["labels"] != IGNORE_INDEX).sum().reshape(1)

    def losses(self, batch: Mapping[str, Tensor], totals: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of ``input_ids`` and ``labels``, ``[B, T]`` int64 without padding, and itself as a part."""
        labels = batch["labels"]
        chosen = labels != IGNORE_INDEX
        hidden = self.student.base_model(input_ids=batch["input_ids"]).last_hidden_state[chosen]
        hidden = self.student.get_submodule(self.transform)(hidden)
        ce = cross_entropy(hidden, self.student.get_output_embeddings(), labels[chosen]) / totals[0]
        return ce, {"loss/ce": ce}


class Classification(Objective):
    """Cross-entropy of the classes: every plain fine-tune of an encoder."""

    def counts(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Examples, int64 ``[1]``."""
        return torch.tensor([len(batch["labels"])], device=batch["labels"].device)

    def losses(self, batch: Mapping[str, Tensor], totals: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch of ``data.segments``, and itself as a part."""
        ce = label_loss(class_logits(self.student, batch), batch["labels"]) / totals[0]
        return ce, {"loss/ce": ce}


class ClassDistillation(Distillation):
    """Stage 3 of an encoder: the labels, the teacher's distribution over the classes, its attention relations."""

    count_names: tuple[str, ...] = ("labels", "relation_rows")

    def counts(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Examples, and rows of the relation KD; int64 ``[2]``."""
        mask = batch["attention_mask"]
        rows = mask.numel() if self.distill.relation_mask == "none" else int(mask.sum())
        return torch.tensor([len(batch["labels"]), rows], device=mask.device)

    def losses(self, batch: Mapping[str, Tensor], totals: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum and its parts, raw and weighted."""
        config, labels = self.distill, batch["labels"]
        logits, states_s = self._tapped(self.student, batch, 0)
        with torch.no_grad():
            logits_t, states_t = self._tapped(self.teacher.to(labels.device), batch, 1)
        loss = label_loss(logits, labels) / totals[0]
        parts = {"loss/ce": loss}
        if config.lambda_logits:
            factor = config.temperature**2 if config.tau_squared else 1.0
            kd = factor * logits_kd(logits, logits_t, temperature=config.temperature) / totals[0]
            weighted = config.lambda_logits * kd
            loss = loss + weighted
            parts |= {"loss/logits_kd": kd, "loss/logits_kd_weighted": weighted}
        if config.gamma_relation:
            real = batch["attention_mask"].bool()
            relation = self._relation_kd(states_s, states_t, real) / totals[1]
            weighted = config.gamma_relation * relation
            loss = loss + weighted
            parts |= {"loss/relation_kd": relation, "loss/relation_kd_weighted": weighted}
        return loss, parts

    def _tapped(
        self, model: PreTrainedModel, batch: Mapping[str, Tensor], side: int
    ) -> tuple[Tensor, dict[int, States]]:
        """Class logits and the tapped states of one model; ``side`` 0 is the student's, 1 the teacher's."""
        layers = tuple(pair[side] for pair in self.layer_pairs)
        with capture(model, layers, self.distill.relation_states) as states:
            return class_logits(model, batch), states


def class_logits(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits ``[B, classes]`` of an encoder's classifier for a batch of ``data.segments``."""
    return model(**{name: batch[name] for name in INPUTS}).logits
