"""A training step on the meta device: the real classes and the real objective, without memory and without arithmetic.

Meta tensors have a shape, a type, and a storage of so many bytes that does not exist; autograd records them like any
other. What depends on values or on the device they cannot answer, so `MetaStep` answers it for them:

    the device    code asks tensors for it, to make new tensors there and for autocast
    autocast      knows no meta device: the operands of products are cast as it would
    attention     fused, as CPUs and GPUs have it: q, k, v, the output and a log-sum-exp a row outlive the forward pass
    values        how many rows a mask selects; whether a mask is all true (no: there is padding)

`LiveBytes` counts the bytes of all storages that are alive.
"""

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META, DEVICE = torch.device("meta"), torch.device("cpu")

_PRODUCTS = {
    torch.matmul, torch.mm, torch.bmm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm,
    torch.Tensor.__matmul__, torch.Tensor.__rmatmul__, F.linear, F.scaled_dot_product_attention,
}  # fmt: skip
"""Calls whose operands autocast makes 16 bits wide, of those that occur in a decoder and its losses."""

_DEVICE_OF = Tensor.device.__get__  # type: ignore[attr-defined]
_ANSWERED = {_DEVICE_OF, Tensor.__bool__, Tensor.__getitem__, Tensor.to, *_PRODUCTS}


class MetaStep(TorchFunctionMode):
    """Inside, meta tensors behave as tensors of a device; new tensors are meta tensors.

    Args:
        selected: rows that a mask selects.
    """

    def __init__(self, selected: int) -> None:
        super().__init__()
        self.selected = selected

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if func not in _ANSWERED and kwargs.get("device") is None:
            return func(*args, **kwargs)
        if func == _DEVICE_OF:
            return DEVICE
        if func is Tensor.__bool__:
            return False
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype is torch.bool:
            return _Selection.apply(*args, self.selected)
        if func in _PRODUCTS and torch.is_autocast_enabled(DEVICE.type):
            args, kwargs = tuple(map(_cast, args)), {name: _cast(value) for name, value in kwargs.items()}
        if func is F.scaled_dot_product_attention:
            return _fused_attention(*args, **kwargs)
        if func is Tensor.to:
            args = tuple(META if isinstance(x, torch.device) else x for x in args)
        if kwargs.get("device") is not None:
            kwargs = kwargs | {"device": META}
        return func(*args, **kwargs)


def _cast(x: Any) -> Any:
    if isinstance(x, Tensor) and x.dtype is torch.float32:
        return x.to(torch.get_autocast_dtype(DEVICE.type))
    return x


class _Selection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, selected: int) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.shape = x.shape
        return x.new_empty(selected, *x.shape[mask.dim() :])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.new_empty(ctx.shape), None, None


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **settings: Any
) -> Tensor:
    del settings  # dropout, scale and causality change values only
    bias = (
        None if attn_mask is None else attn_mask.to(query.dtype)
    )  # kernels add a mask, so it is made a number
    return _FusedAttention.apply(query, key, value, bias)  # type: ignore[no-any-return]


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        batch, heads, tokens, _ = query.shape
        output = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        log_sum = query.new_empty(batch, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, bias, output, log_sum)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        del grad
        return *(torch.empty_like(x) for x in ctx.saved_tensors[:3]), None


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that were made inside and are alive, and the most there were since ``peak`` was last set.

    Results of an operation that was seen before on such shapes are made without asking it: meta kernels are slow.

    Args:
        outside: tensors that are not to be counted, by themselves or through views of them.
    """

    def __init__(self, outside: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in outside}
        self._results: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        key = (func, *map(_form, args), *((name, _form(value)) for name, value in kwargs.items()))
        form = self._results.get(key)
        if form is not None:
            result = torch.empty_strided(*form[:2], dtype=form[2], device=META)
        else:
            result = func(*args, **kwargs)
            if isinstance(result, Tensor) and result.is_meta and _makes_new_storage(func):
                self._results[key] = result.shape, result.stride(), result.dtype
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        self.peak = max(self.peak, self.now)
        return result

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage from now until it is freed."""
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address not in self._known:
            self._known.add(address)
            self.now += size
            weakref.finalize(storage, self._remove, address, size)

    def _remove(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


def _form(x: Any) -> Any:
    """What a result's form depends on, to look it up by."""
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype
    return tuple(map(_form, x)) if isinstance(x, list | tuple) else x


@functools.cache
def _makes_new_storage(func: Any) -> bool:
    """Whether an operation changes no argument and returns no view of one."""
    schema = func._schema
    return not schema.is_mutable and all(value.alias_info is None for value in schema.returns)
