"""How much of a ternary model's arithmetic falls on zeros, counted while it reads text (BitNet a4.8, table 2)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import CheckpointError
from .model import BitLinear

INPUTS, GATE = "inputs", "gate"


class ZeroCount:
    """Zeros among what was counted, by path."""

    def __init__(self) -> None:
        self.zeros: dict[tuple[str, str], int] = {}
        self.all: dict[tuple[str, str], int] = {}

    def add(self, path: str, what: str, x: Tensor) -> None:
        """Count one tensor."""
        key = path, what
        self.zeros[key] = self.zeros.get(key, 0) + int((x == 0).sum())
        self.all[key] = self.all.get(key, 0) + x.numel()

    def share(self, path: str, what: str = INPUTS) -> float:
        """Share of zeros; 0 where nothing was counted."""
        return self.zeros.get((path, what), 0) / max(1, self.all.get((path, what), 0))


@contextmanager
def counting(model: PreTrainedModel) -> Iterator[ZeroCount]:
    """Count, in the forward passes inside the context, zeros among the quantised inputs of every BitLinear, and among
    the outputs of every feed-forward's activation function.

    Raises:
        CheckpointError: the model has no BitLinear.
    """
    linears = {path: m for path, m in model.named_modules() if isinstance(m, BitLinear)}
    if not linears:
        raise CheckpointError(f"{type(model).__name__} has no ternary linear, whose zeros could be counted")
    count = ZeroCount()
    handles = [_count_inputs(linear, path, count) for path, linear in linears.items()]
    handles += [
        _count_gate(module.act_fn, path, count)
        for path, module in model.named_modules()
        if isinstance(getattr(module, "act_fn", None), nn.Module)
    ]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


def _count_inputs(linear: BitLinear, path: str, count: ZeroCount) -> Any:
    def hook(module: BitLinear, args: tuple[Tensor, ...]) -> None:
        count.add(path, INPUTS, module.quantized_inputs(args[0]))

    return linear.register_forward_pre_hook(hook)


def _count_gate(activation: nn.Module, path: str, count: ZeroCount) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        del module, args
        count.add(path, GATE, output)

    return activation.register_forward_hook(hook)


def sparsity(model: PreTrainedModel, count: ZeroCount) -> dict[str, float]:
    """Share of multiplications with a zero input, ``zeros_NAME`` by kind of linear and ``zeros_overall`` of all.

    A column of up_proj whose gate is zero need not be computed: its share is ``1 - (1 - inputs) (1 - gate)``.
    ``active_parameters``: ternary weights that a token meets in the mean.
    """
    skipped: dict[str, float] = {}
    weights: dict[str, int] = {}
    for path, linear in model.named_modules():
        if not isinstance(linear, BitLinear):
            continue
        parent, _, name = path.rpartition(".")
        zero = count.share(path)
        if name == "up_proj":
            zero = 1 - (1 - zero) * (1 - count.share(parent, GATE))
        skipped[name] = skipped.get(name, 0.0) + zero * linear.weight.numel()
        weights[name] = weights.get(name, 0) + linear.weight.numel()
    total = sum(weights.values())
    return {f"zeros_{name}": skipped[name] / weights[name] for name in weights} | {
        "zeros_overall": sum(skipped.values()) / total,
        "active_parameters": total - sum(skipped.values()),
    }
