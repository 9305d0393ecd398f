"""Surgery: a full-precision Hugging Face model in, a ternary student and a report out.

The student keeps every tensor of the model (biases, norms, embeddings and tied heads included); what is new are the
gains of the SubLN norms. They start at 1, or at the RMS of what each norm will see, which keeps the size
of every activation as the model learnt it. A Hadamard transform before a linear goes into its weight, W <- W H^T in
blocks, so that W x stays what it was.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import SurgeryError
from ..model import STUDENT_CLASSES, BitLinear, Family, TernarySpec, ends_in, student_class
from ..model.hadamard import hadamard_transform
from .calibration import calibrate_gains
from .initialisation import Findings
from .loading import convertible_family, keep_pooler
from .size import ModelSize, model_size


@dataclass(frozen=True)
class SurgeryReport:
    """What surgery did, as data; ``str()`` is the table for people."""

    family: str
    replaced: tuple[tuple[str, tuple[int, int], bool], ...]
    """Path, ``(out_features, in_features)`` and whether a SubLN was added."""
    skipped: tuple[tuple[str, str], ...]
    """Path and reason of every linear that stays full precision."""
    before: ModelSize
    after: ModelSize
    hadamard: tuple[tuple[str, int], ...] = ()
    """Sites whose inputs are Hadamard-transformed, and the size of the blocks."""
    findings: Findings | None = None
    """What calibration measured; None where none was."""

    def __str__(self) -> str:
        norms = sum(norm for _, _, norm in self.replaced)
        lines = [
            f"{self.family}: {len(self.replaced)} linears made ternary, {norms} SubLN added, "
            f"{len(self.skipped)} linears left in full precision",
        ]
        lines += [
            f"  Hadamard transform of {site}'s input, blocks of {block}" for site, block in self.hadamard
        ]
        lines += [
            f"  {path:<44} {rows} x {columns}{'  + SubLN' if norm else ''}{self._error(path)}"
            for path, (rows, columns), norm in self.replaced
        ]
        lines += [f"  {path:<44} kept: {reason}" for path, reason in self.skipped]
        if self.findings is not None:
            lines += [f"  {note}" for note in self.findings.notes]
            lines.append("error: ||(W_q - W) X|| / ||W X|| on the calibration text")
        share = self.after.ternary_parameters / self.after.parameters
        lines += [
            f"parameters {self.before.parameters:,} -> {self.after.parameters:,} ({share:.1%} ternary)",
            f"bytes      {self.before.bytes:,} -> {self.after.bytes:,} "
            f"({self.before.bytes / self.after.bytes:.2f}x smaller; 16-bit before; 1.6 bits a ternary weight after)",
        ]
        return "\n".join(lines)

    def _error(self, path: str) -> str:
        """The relative output error of one linear, as the table has it."""
        if self.findings is None:
            return ""
        absmean, chosen = self.findings.errors[path]
        name = self.findings.initialisation
        return f"  error {absmean:.4f}" + (f" -> {chosen:.4f} ({name})" if name != "absmean" else "")


def refine(
    model: PreTrainedModel,
    spec: TernarySpec,
    calibration: Iterable[dict[str, Tensor]] | None = None,
    *,
    fold: bool = True,
) -> tuple[PreTrainedModel, SurgeryReport]:
    """Convert a model into a student of the same family and kind: a causal LM, or an encoder with its head.

    Args:
        model: a full-precision model of a family in the table; not changed.
        spec: which linears, norm sites, scales and activation bits.
        calibration: batches of ``input_ids`` (and ``attention_mask``), ``[B, T]``; if given, norm gains start at the
            RMS of the norm's input in ``model`` on them, otherwise at 1.
        fold: undo each Hadamard transform of an input in the weight behind it; without it, for random weights.

    Raises:
        SurgeryError: unknown family, a model that is a student already, nothing to replace, or a Hadamard block that
            does not divide its dimension.
    """
    family = convertible_family(model.config.model_type)
    _check_sites(model, family, spec)
    student = _make_student(model, family, spec, fold)
    if calibration is not None:
        calibrate_gains(model, student, calibration)
    return student, _report(model, student, family, spec)


def _check_sites(model: PreTrainedModel, family: Family, spec: TernarySpec) -> None:
    """A layer without its output projections would lose SubLN silently; say so instead."""
    paths = [path for path, m in model.named_modules() if isinstance(m, nn.Linear)]
    for pattern in spec.skip:
        if not any(fnmatch(path, pattern) for path in paths):
            raise SurgeryError(
                f"refine.skip: no linear matches {pattern!r}; paths look like {paths[0]}. Nothing was converted."
            )
    missing = [name for name in family.linears_out if not any(ends_in(path, (name,)) for path in paths)]
    if missing:
        raise SurgeryError(
            f"{type(model).__name__} has no linear named {' or '.join(missing)}, where SubLN belongs; "
            f"is it a {family.model_type} model with fused or renamed projections? Un-fuse them, "
            "or describe the layout in bitdistill/model/families.py"
        )


def _make_student(model: PreTrainedModel, family: Family, spec: TernarySpec, fold: bool) -> PreTrainedModel:
    config_class = STUDENT_CLASSES[family.model_type][0]
    model_class = student_class(family, type(model).__name__)
    if model_class is None:
        known = " or ".join(family.model_classes.values())
        raise SurgeryError(f"{type(model).__name__} has no student class; load the checkpoint as {known}")
    values: dict[str, Any] = model.config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "transformers_version"):
        values.pop(key, None)
    try:
        student = model_class(config_class(ternary=spec.to_dict(), **values))
    except ValueError as error:
        raise SurgeryError(str(error)) from error
    keep_pooler(student, model)
    result = student.load_state_dict(model.state_dict(), strict=False)
    new = (".norm.weight", ".weight_scale")
    lost = [*result.unexpected_keys, *(k for k in result.missing_keys if not k.endswith(new))]
    if lost:
        raise SurgeryError(
            f"{type(model).__name__} holds tensors that {model_class.__name__} has no place for, or lacks "
            f"some it needs: {', '.join(lost[:4])}. Nothing was converted."
        )
    for module in (m for m in student.modules() if isinstance(m, BitLinear)):
        if fold and module.hadamard_block:
            module.weight.data.copy_(hadamard_transform(module.weight.data, module.hadamard_block))
        if module.weight_scale is not None:
            module.weight_scale.data.copy_(module.absmean())
    student.tie_weights()
    if model.can_generate():
        student.generation_config = model.generation_config
    return student.eval()


def _report(
    model: PreTrainedModel, student: PreTrainedModel, family: Family, spec: TernarySpec
) -> SurgeryReport:
    replaced, skipped = [], []
    for path, module in student.named_modules():
        if isinstance(module, BitLinear):
            shape = (module.out_features, module.in_features)
            replaced.append((path, shape, module.norm is not None))
        elif isinstance(module, nn.Linear):
            pattern = next((p for p in spec.skip if fnmatch(path, p)), None)
            if pattern is not None:
                reason = f"matches skip pattern {pattern!r}"
            elif module is student.get_output_embeddings():
                reason = "output head"
            else:
                reason = f"not one of the family's ternary linears ({', '.join(family.linears)})"
            skipped.append((path, reason))
    return SurgeryReport(
        family.model_type,
        tuple(replaced),
        tuple(skipped),
        model_size(model),
        model_size(student),
        hadamard=tuple(student.config.ternary.get("hadamard", {}).items()),
    )
