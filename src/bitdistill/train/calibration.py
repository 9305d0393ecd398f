"""What stage 1 measures on a few sequences of the stage-2 text: norm gains, and the inputs of a student's linears.

The layers come one after the other, so that one layer's statistics exist at a time, and so that GPTQ can show a layer
what the quantised ones before it make of the text.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import Recipe
from ..data.corpus import PackedSequences, build_shards, collate_packed
from ..data.masked import FramedSequences
from ..errors import SurgeryError
from ..model import UNQUANTISED, BitLinear

CALIBRATION_BATCH = 8

Batch = dict[str, Tensor]
"""``input_ids`` and ``attention_mask``, ``[B, T]``; without the mask every token is real."""


def calibration_batches(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, corpus_digest: str, framed: bool
) -> list[Batch]:
    """The first ``calibration_sequences`` sequences of the stage-2 text, with ``[CLS]`` and ``[SEP]`` if ``framed``."""
    shards = build_shards(recipe.corpus, "pretrain", tokenizer, recipe.shards_dir, digest=corpus_digest)
    length = recipe.corpus.sequence_length
    dataset = FramedSequences(shards, length, tokenizer) if framed else PackedSequences(shards, length)
    count = min(recipe.refine.calibration_sequences, len(dataset))
    batches = []
    for start in range(0, count, CALIBRATION_BATCH):
        items = [dataset[i] for i in range(start, min(start + CALIBRATION_BATCH, count))]
        ids = collate_packed(items)["input_ids"]
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return batches


# --- norm gains ---


@torch.no_grad()
def calibrate_gains(model: PreTrainedModel, student: PreTrainedModel, calibration: Iterable[Batch]) -> None:
    """Set every SubLN gain to the mean over tokens of the RMS of its input in the full-precision model.

    Raises:
        SurgeryError: there is no batch.
    """
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    mask = torch.empty(0)
    sites = [n for n, m in student.named_modules() if isinstance(m, BitLinear) and m.norm is not None]

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            del module
            rms = args[0].float().pow(2).mean(dim=-1).sqrt() * mask
            sums[name] = sums.get(name, 0.0) + float(rms.sum())
            counts[name] = counts.get(name, 0.0) + float(mask.sum())

        return record

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in sites]
    model.eval()
    try:
        for batch in calibration:
            batch = {key: value.to(model.device) for key, value in batch.items()}
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).float()
            model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"))
    finally:
        for handle in handles:
            handle.remove()
    if not sums:
        raise SurgeryError("no calibration batch was given for gain = 'rms'; give text or use gain = 'one'")
    for name in sites:
        student.get_submodule(name).norm.weight.fill_(sums[name] / counts[name])


# --- layers one after the other ---


@dataclass(frozen=True)
class Call:
    """What one calibration batch brings to a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor
    """Real tokens, ``[B, T]``, bool."""

    def run(self, module: nn.Module) -> Tensor:
        """The module's (first) output, ``[B, T, features]``."""
        output = module(*self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


@contextmanager
def quantisers_off(module: nn.Module) -> Iterator[None]:
    """Inside, every BitLinear of ``module`` is a full-precision linear behind its norm and transform: its latents, its
    input. Queries, keys and values are what they are."""
    layers = [m for m in module.modules() if isinstance(m, BitLinear)]
    before = [(m.training, m.quant_lambda) for m in layers]
    attentions = [m for m in module.modules() if hasattr(m, "state_bits")]
    bits = [m.state_bits for m in attentions]
    for layer in layers:
        layer.training, layer.quant_lambda = True, 0.0
    for attention in attentions:
        attention.state_bits = UNQUANTISED  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, (training, quant_lambda) in zip(layers, before, strict=True):
            layer.training, layer.quant_lambda = training, quant_lambda
        for attention, state_bits in zip(attentions, bits, strict=True):
            attention.state_bits = state_bits


@contextmanager
def recorded_calls(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, tuple[tuple, dict]]]:
    """Inside, the arguments that each module was last called with."""
    found: dict[nn.Module, tuple[tuple, dict]] = {}

    def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
        found[module] = args, kwargs

    handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def stacked_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Path and modules of the layers of a decoder or an encoder."""
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=lambda found: len(found[1]))


@torch.no_grad()
def layers_in_turn(
    student: PreTrainedModel, calibration: Sequence[Batch], *, quantised: bool
) -> Iterator[tuple[str, nn.Module, list[Call]]]:
    """Path, module and inputs of each layer; what the caller does to a layer, the next one sees.

    Args:
        quantised: a layer's inputs come from ternary weights and quantised activations of those before it; otherwise
            from their full-precision values.
    """
    path, layers = stacked_layers(student)
    first: list[Tensor] = []
    arguments, masks = [], []
    for batch in calibration:
        batch = {key: value.to(student.device) for key, value in batch.items()}
        with quantisers_off(student), recorded_calls(layers) as found:
            student.base_model(**batch, use_cache=False)
        first.append(found[layers[0]][0][0])
        arguments.append([(found[layer][0][1:], found[layer][1]) for layer in layers])
        masks.append(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool())
    hidden = first
    for index, layer in enumerate(layers):
        calls = [
            Call((states, *rest[index][0]), rest[index][1], mask)
            for states, rest, mask in zip(hidden, arguments, masks, strict=True)
        ]
        yield f"{path}.{index}", layer, calls
        with nullcontext() if quantised else quantisers_off(layer):
            hidden = [call.run(layer) for call in calls]


# --- statistics of inputs ---


@dataclass
class InputStatistics:
    """Of the real tokens ``x`` that a linear multiplies: behind its norm and its Hadamard transform, before the
    quantiser of activations."""

    gram: Tensor
    """Sum of ``x x^T``, ``[K, K]``, fp64: half of GPTQ's Hessian."""
    magnitude: Tensor
    """Sum of ``|x|``, ``[K]``, fp64."""
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        """Count tokens ``[n, K]``."""
        self.gram += (x.T @ x).double()
        self.magnitude += x.abs().sum(dim=0, dtype=torch.float64)
        self.tokens += len(x)

    def scaled(self, scales: Tensor) -> "InputStatistics":
        """Of ``x / scales``, with scales ``[K]`` of the channels."""
        wide = scales.double()
        return InputStatistics(self.gram / torch.outer(wide, wide), self.magnitude / wide, self.tokens)


@torch.no_grad()
def input_statistics(layer: nn.Module, calls: Sequence[Call]) -> dict[str, InputStatistics]:
    """Path inside ``layer`` -> statistics of every ternary linear, the layer itself in full precision."""
    linears = {path: m for path, m in layer.named_modules() if isinstance(m, BitLinear)}
    found = {}
    for path, linear in linears.items():
        size, device = linear.in_features, linear.weight.device
        found[path] = InputStatistics(
            torch.zeros(size, size, dtype=torch.float64, device=device),
            torch.zeros(size, dtype=torch.float64, device=device),
        )
    for call in calls:
        with quantisers_off(layer), recorded_calls(linears.values()) as inputs:
            call.run(layer)
        for path, linear in linears.items():
            found[path].add(linear.inputs(inputs[linear][0][0])[call.mask].float())
    return found


def output_energy(weight: Tensor, gram: Tensor) -> float:
    """Squared output of ``weight`` ``[N, K]`` over all tokens, ``||W X||^2 = tr(W (X X^T) W^T)``."""
    wide = weight.detach().double()
    return float(((wide @ gram) * wide).sum())
