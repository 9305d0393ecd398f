"""What autograd keeps between a forward pass and its backward pass."""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor


class _Kept:
    """A tensor that was saved for the backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_elements(make_loss: Callable[[], Tensor]) -> tuple[int, int]:
    """Elements in all and in the largest of the tensors that outlive ``make_loss`` for the backward pass."""
    alive: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        alive.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        loss = make_loss()
    kept = [(entry.tensor.untyped_storage(), entry.tensor.itemsize) for entry in alive]
    sizes = {storage.data_ptr(): storage.nbytes() // itemsize for storage, itemsize in kept}
    loss.backward()  # the graph, and so what it saved, lives until here
    return sum(sizes.values()), max(sizes.values(), default=0)
