"""The switch from 8-bit to 4-bit activations within one training (BitNet v2, arXiv 2504.18415).

The paper trains 95 % of its tokens with INT8 activations and the rest with INT4 ones, going on with the optimizer's
state. Weights, their quantiser and all schedules know nothing of it.
"""

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerState

from ..config import TrainingConfig
from ..errors import TrainingError
from ..model import BitLinear
from .native import is_native
from .schedule import activations_are_int4

INT4 = 4


class Int4Tail(TrainerCallback):
    """Sets the activation bits of a student before every optimizer step; they are a function of the step, so a resumed
    run has the same ones."""

    def __init__(self, student: PreTrainedModel, config: TrainingConfig) -> None:
        self.student = student
        self.config = config
        self.bits_before = _activation_bits(student)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Those of the step that begins; a held-out loss after it is computed with them too."""
        is_int4 = activations_are_int4(self.config, state.global_step, state.max_steps)
        set_activation_bits(self.student, INT4 if is_int4 else self.bits_before)

    def finish(self) -> None:
        """What was trained is what is saved."""
        set_activation_bits(self.student, INT4)


def int4_tail(student: PreTrainedModel, config: TrainingConfig) -> Int4Tail | None:
    """The switch of a training; None where it asks for none or the model is in full precision.

    Raises:
        TrainingError: the student has 4 bits from the start, or its checkpoint has no place for them.
    """
    if not config.int4_activations_ratio or not _layers(student):
        return None
    what = f"int4_activations_ratio = {config.int4_activations_ratio}"
    if is_native(student.config):
        raise TrainingError(
            f"{what}: Hugging Face's BitNet has no place for activation bits in its config and computes with 8; set it "
            'to 0, or train a base with architecture = "bitnet_v2"'
        )
    if _activation_bits(student) == INT4:
        raise TrainingError(f"{what}: the student has 4-bit activations in all steps already; set it to 0")
    return Int4Tail(student, config)


def set_activation_bits(student: PreTrainedModel, bits: int) -> None:
    """Give every ternary linear of a student activations of ``bits``, and say so in its config; in place."""
    for layer in _layers(student):
        layer.spec = replace(layer.spec, activation_bits=bits)
    student.config.ternary = student.config.ternary | {"activation_bits": bits}


def _layers(student: PreTrainedModel) -> list[BitLinear]:
    return [module for module in student.modules() if isinstance(module, BitLinear)]


def _activation_bits(student: PreTrainedModel) -> int:
    """They are the same in all ternary linears."""
    return _layers(student)[0].spec.activation_bits
