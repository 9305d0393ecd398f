"""A student whose parameters FSDP2 shards over the processes, as ``accelerate launch`` with ``fsdp_version: 2`` has it.

The absmean of a ternary weight is that of the fp32 latents of the whole matrix. FSDP2 therefore gathers fp32 here, and
the products run in bf16 by autocast, as they do without it: a layer sees what it would see unsharded, to the bit.

A checkpoint of either kind, one file or shards, loads into a model of either kind on any number of processes.
"""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

MODEL_SHARDS = "pytorch_model_fsdp_0"
OPTIMIZER_SHARDS = "optimizer_0"
"""Folders inside a checkpoint, as accelerate names them."""

GATHER_FP32 = MixedPrecisionPolicy()
"""Parameters are gathered and gradients reduced in the dtype of the latents."""


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 holds parameters of ``model``."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its shards, on every process; every process must ask. An unsharded one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process holds of ``like``, which has the same shape."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).to_local()


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a sharded model in host memory, empty but for the main process; every process must ask."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def shard_frozen(model: PreTrainedModel, layers: Iterable[nn.Module]) -> None:
    """Shard a model that only runs forward: its decoder and each of ``layers``. The head stays whole everywhere."""
    for layer in layers:
        fully_shard(layer, mp_policy=GATHER_FP32)
    decoder = fully_shard(model.base_model, mp_policy=GATHER_FP32)
    model.get_output_embeddings().to(next(decoder.parameters()).device)


# --- checkpoints ---


def holds_shards(checkpoint: Path) -> bool:
    """Whether shards of model and optimizer were written to their end: their index comes last."""
    return all((checkpoint / name / ".metadata").is_file() for name in (MODEL_SHARDS, OPTIMIZER_SHARDS))


def load_weights(objective: nn.Module, checkpoint: Path) -> set[str]:
    """Load the student inside ``objective``, sharded or not; returns the names that only one of the two has."""
    if holds_shards(checkpoint):
        state: dict[str, Any] = {"model": get_model_state_dict(objective)}
        _fill(state, checkpoint / MODEL_SHARDS)
        set_model_state_dict(objective, state["model"])
        return set()
    loaded = {
        f"student.{name}": tensor for name, tensor in load_file(checkpoint / "model.safetensors").items()
    }
    if is_sharded(objective):
        options = StateDictOptions(full_state_dict=True, strict=False)
        result = set_model_state_dict(objective, loaded, options=options)
    else:
        result = objective.load_state_dict(loaded, strict=False)
    return set(result.missing_keys) | set(result.unexpected_keys)


def load_optimizer(model: nn.Module, optimizer: Optimizer, checkpoint: Path) -> None:
    """Load the optimizer's state; sharded or not, from either kind of checkpoint."""
    if holds_shards(checkpoint):
        state: dict[str, Any] = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        _fill(state, checkpoint / OPTIMIZER_SHARDS)
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        return
    stored = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
    if not is_sharded(model):
        optimizer.load_state_dict(stored)
        return
    # Stored by number, in the order of the groups; shards go by name.
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    names = [[name_of[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    state, groups = {}, []
    for group, group_names in zip(stored["param_groups"], names, strict=True):
        groups.append(group | {"params": group_names})
        state |= {
            name: stored["state"][number] for number, name in zip(group["params"], group_names, strict=True)
        }
    set_optimizer_state_dict(
        model,
        optimizer,
        {"state": state, "param_groups": groups},
        options=StateDictOptions(full_state_dict=True),
    )


def _fill(state: dict[str, Any], folder: Path) -> None:
    """Read shards into the tensors of ``state``, whatever lies where."""
    with warnings.catch_warnings():
        # One process needs no process group for it, and torch says so at every call.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, checkpoint_id=folder)
