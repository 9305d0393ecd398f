"""Run by torchrun on two processes: students that ``fully_shard`` shards against whole ones. Prints one JSON object.

For every objective and compute dtype: how the parameters lie, whether every ternary weight that a layer multiplied by
is equal to the whole student's to the bit, and the losses of some AdamW steps on two processes and on one.
"""

import contextlib
import copy
import json
import sys

import torch
import torch.distributed as dist
from tiny_families import small_model, small_student
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from bitdistill.config import DistillConfig
from bitdistill.model import layers
from bitdistill.train.objective import Distillation, LanguageModelling
from bitdistill.train.sharding import GATHER_FP32, is_sharded, own_part
from bitdistill.train.weights import bit_codes, ternary_codes

STEPS = 4
multiplied: list[torch.Tensor] = []
fake_quantize_weight = layers.fake_quantize_weight


def watched(*arguments):
    multiplied.append(fake_quantize_weight(*arguments))
    return multiplied[-1]


def batches() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    ids = [torch.randint(2, 300, (4, 12)) for _ in range(STEPS)]
    return [{"input_ids": x, "labels": x, "attention_mask": torch.ones_like(x)} for x in ids]


def make(kind: str, spec: dict[str, object]) -> LanguageModelling:
    student = small_student("qwen3", spec)
    if kind == "language modelling":
        return LanguageModelling(student)
    return Distillation(student, small_model("qwen3"), DistillConfig(relation_heads=2))


def train(objective, *, rank: int, processes: int, bf16: bool) -> tuple[list[float], list[torch.Tensor]]:
    """Losses of every step, and the ternary weights of the first forward pass."""
    objective.train()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    losses, first = [], []
    for batch in batches():
        mine = {key: value.chunk(processes)[rank] for key, value in batch.items()}
        multiplied.clear()
        autocast = (
            torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if bf16 else contextlib.nullcontext()
        )
        with autocast:
            loss = objective(**mine, totals=objective.counts(batch))["loss"]
        first = first or [weight.detach().clone() for weight in multiplied]
        (loss * processes).backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().float()
        if processes > 1:
            dist.all_reduce(total)
        losses.append(float(total))
    return losses, first


def compare(
    kind: str, *, bf16: bool, policy: MixedPrecisionPolicy = GATHER_FP32, **spec: object
) -> dict[str, object]:
    whole_one = make(kind, spec)
    sharded = copy.deepcopy(whole_one)
    if kind == "distillation":
        sharded.shard_teacher()
    for layer in sharded.student.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(sharded, mp_policy=policy)
    sizes = [(p.to_local().numel(), p.numel()) for p in sharded.parameters() if isinstance(p, DTensor)]
    codes = ternary_codes(whole_one.student)
    same_codes = all(
        torch.equal(part, own_part(codes[path], sharded.student.get_parameter(f"{path}.weight")))
        for path, part in bit_codes(sharded.student).items()
    )
    expected, expected_weights = train(whole_one, rank=0, processes=1, bf16=bf16)
    found, weights = train(sharded, rank=dist.get_rank(), processes=2, bf16=bf16)
    return {
        "sharded": all(isinstance(p, DTensor) and p.placements == (Shard(0),) for p in sharded.parameters()),
        "share": sum(local for local, _ in sizes) / sum(total for _, total in sizes),
        "teacher_sharded": kind == "distillation" and is_sharded(sharded.teacher),
        "weights": len(weights),
        "equal_weights": sum(torch.equal(a, b) for a, b in zip(expected_weights, weights, strict=True)),
        "equal_codes_of_shards": same_codes,
        "losses": [expected, found],
    }


def main() -> dict[str, dict[str, object]]:
    layers.fake_quantize_weight = watched
    found = {}
    for kind in ("language modelling", "distillation"):
        for bf16 in (False, True):
            found[f"{kind}, {'bf16' if bf16 else 'fp32'}"] = compare(kind, bf16=bf16)
    blocks = {"granularity": "block", "block_size": 20}
    found["channel"] = compare("language modelling", bf16=True, granularity="channel")
    found["block"] = compare("language modelling", bf16=True, **blocks)
    found["learned, tensor"] = compare("language modelling", bf16=False, scale="learned")
    found["learned, block"] = compare("language modelling", bf16=False, scale="learned", **blocks)
    v2 = {"hadamard": {"o_proj": 0, "down_proj": 0}, "activation_bits": 4, "query_bits": 4, "kv_bits": 3}
    found["BitNet v2"] = compare("distillation", bf16=False, **v2)
    accelerates = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    found["gathered in bf16"] = compare("language modelling", bf16=True, policy=accelerates)
    return found


if __name__ == "__main__":
    dist.init_process_group("gloo")
    result = main()
    if dist.get_rank() == 0:
        json.dump(result, sys.stdout)
    dist.destroy_process_group()
