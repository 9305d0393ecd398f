"""What outlier channels do to quantised inputs of o_proj and down_proj, with the Hadamard transform and without.

    python benchmarks/bitnet_v2/outliers.py recipe.toml benchmarks/bases/qwen3_1.5m --output outliers.json

A controlled test: in every layer ``--channels`` outputs of v_proj and up_proj are multiplied by a power of two, and the
weights that read them are divided by it. The model in full precision is the same function to the bit; the inputs
of the two linears now have outliers of a known size. Only these inputs are quantised; weights stay as they are. The
result is the held-out perplexity of the recipe's corpus, by factor, bits, and with and without the transform.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitdistill.checkpoint import provenance, write_json
from bitdistill.errors import BitDistillError
from bitdistill.evaluate import TorchScorer
from bitdistill.model.hadamard import default_block, hadamard_transform
from bitdistill.model.quant import fake_quantize_activation
from bitdistill.pipeline import heldout_sequences
from bitdistill.recipe import load_recipe
from bitdistill.train.loading import load_model, load_tokenizer

BITS = (16, 8, 4)


@torch.no_grad()
def inject(model: PreTrainedModel, factor: float, channels: int, seed: int) -> None:
    """Multiply the input of o_proj and down_proj at random channels by ``factor``, a power of two, in place."""
    generator = torch.Generator().manual_seed(seed)
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    for layer in model.base_model.layers:
        v_proj, o_proj = layer.self_attn.v_proj, layer.self_attn.o_proj
        chosen = torch.randperm(v_proj.out_features, generator=generator)[:channels]
        v_proj.weight[chosen] *= factor
        # A value head is read by as many query heads as share it, side by side.
        by_head = o_proj.weight.unflatten(1, (model.config.num_key_value_heads, groups, -1))
        width = by_head.shape[-1]
        for channel in chosen.tolist():
            by_head[:, channel // width, :, channel % width] /= factor
        up_proj, down_proj = layer.mlp.up_proj, layer.mlp.down_proj
        chosen = torch.randperm(up_proj.out_features, generator=generator)[:channels]
        up_proj.weight[chosen] *= factor
        down_proj.weight[:, chosen] /= factor


@contextmanager
def quantised_inputs(model: PreTrainedModel, bits: int, *, hadamard: bool) -> Iterator[None]:
    """Quantise what o_proj and down_proj read, behind the transform, which is undone again."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        del module
        x = args[0]
        if not hadamard:
            return (fake_quantize_activation(x, bits),)
        block = default_block(x.shape[-1])
        return (
            hadamard_transform(fake_quantize_activation(hadamard_transform(x, block), bits), block).to(
                x.dtype
            ),
        )

    ends = ("o_proj", "down_proj")
    linears = [m for name, m in model.named_modules() if name.endswith(ends)] if bits < 16 else []
    handles = [linear.register_forward_pre_hook(hook) for linear in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("model", help="A full-precision decoder of the Llama kind.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--factors", type=float, nargs="+", default=[1, 4, 16, 64], help="Powers of two.")
    parser.add_argument("--channels", type=int, default=2, help="Outliers of each input.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    recipe = load_recipe(options.recipe, options.overrides)
    tokenizer = load_tokenizer(options.model)
    heldout = heldout_sequences(recipe, tokenizer)
    rows: list[dict[str, Any]] = []
    for factor in options.factors:
        model = load_model(options.model).eval()
        inject(model, factor, options.channels, options.seed)
        for bits, hadamard in product(BITS, (False, True)):
            if bits == 16 and hadamard:
                continue
            with quantised_inputs(model, bits, hadamard=hadamard):
                perplexity = TorchScorer(model, tokenizer).perplexity(heldout)
            rows.append({"factor": factor, "bits": bits, "hadamard": hadamard, "perplexity": perplexity})
            print(f"x{factor:g}  A{bits}{'  Hadamard' if hadamard else ''}  {perplexity:.3f}", flush=True)
    about = {"model": options.model, "channels": options.channels, "seed": options.seed}
    tokens = len(heldout) * recipe.corpus.sequence_length
    write_json(options.output, about | {"heldout_tokens": tokens, "rows": rows} | provenance())


if __name__ == "__main__":
    try:
        main()
    except BitDistillError as error:
        sys.exit(f"error: {error}")
