"""Run by torchrun on two processes: a student that FSDP2 shards against the whole one. Prints one JSON object.

For every layout: the way that its head loss went, and the largest distance of a gradient from the whole student's, in
units of that gradient's largest element.
"""

import copy
import json
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from bitdistill.train import head_loss
from bitdistill.train.objective import LanguageModelling

LAYOUTS = {"root": {"tied": False}, "root, tied": {"tied": True}, "own group": {"tied": False}}


def main() -> dict[str, dict[str, object]]:
    torch.manual_seed(0)
    batch = torch.randint(2, 300, (4, 12))
    mine = batch.chunk(2)[dist.get_rank()]
    ways: list[str] = []

    def watched(way: str):
        function = getattr(head_loss, way)

        def call(*arguments):
            ways.append(way)
            return function(*arguments)

        setattr(head_loss, way, call)

    watched("_fused")
    watched("_checkpointed")
    found = {}
    for layout, options in LAYOUTS.items():
        student = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=300,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                tie_word_embeddings=options["tied"],
            )
        )
        whole = LanguageModelling(copy.deepcopy(student))
        totals = whole.counts({"labels": batch})
        whole(input_ids=batch, labels=batch, totals=totals)["loss"].backward()
        ways.clear()
        sharded = LanguageModelling(student)
        for layer in student.model.layers:
            fully_shard(layer)
        if layout == "own group":
            fully_shard(student.lm_head)
        fully_shard(sharded)
        for _ in range(2):  # accumulated, as two micro-batches are
            loss = sharded(input_ids=mine, labels=mine, totals=2 * totals)["loss"]
            (loss * dist.get_world_size()).backward()
        distances = [
            float((a.grad.full_tensor() - b.grad).abs().max() / b.grad.abs().max())
            for a, b in zip(sharded.parameters(), whole.parameters(), strict=True)
        ]
        found[layout] = {"ways": sorted(set(ways)), "distance": max(distances)}
    return found


if __name__ == "__main__":
    dist.init_process_group("gloo")
    result = main()
    if dist.get_rank() == 0:
        json.dump(result, sys.stdout)
    dist.destroy_process_group()
