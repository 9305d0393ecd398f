"""How large outliers are before o_proj and down_proj, and what the Hadamard transform makes of them: one JSON a model.

    python benchmarks/bitnet_v2/activations.py recipe.toml runs/bitnet_v2/b158_s0/base --output activations.json

Of the inputs x of these linears on held-out text, behind a SubLN where there is one, with the transform and without,
whichever the model was trained with; means over layers and tokens:

    peak     max|x| / rms(x) of a token
    channel  the largest channel's mean |x| over that of all channels
    error    ||Q(x) - x|| / ||x||, Q of 8 bits (absmax) or 4 bits (absmean)
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitdistill.checkpoint import provenance, write_json
from bitdistill.errors import BitDistillError
from bitdistill.evaluate import TorchScorer
from bitdistill.model.hadamard import HADAMARD_SITES, default_block, hadamard_transform
from bitdistill.model.layers import BitLinear
from bitdistill.model.quant import fake_quantize_activation
from bitdistill.pipeline import heldout_sequences
from bitdistill.recipe import load_recipe
from bitdistill.train.loading import load_model, load_tokenizer


@dataclass
class Inputs:
    """Sums over the tokens that a linear has read."""

    tokens: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    """Measure of a token -> its sum."""
    magnitude: Tensor | float = 0.0
    """Sum of |x| by channel, ``[K]``."""

    def add(self, x: Tensor) -> None:
        """Count tokens ``[n, K]``."""
        self.tokens += len(x)
        self.magnitude = self.magnitude + x.abs().sum(dim=0)
        for name, values in token_measures(x).items():
            self.sums[name] = self.sums.get(name, 0.0) + float(values.sum())

    def means(self) -> dict[str, float]:
        """All measures."""
        of_channels = torch.as_tensor(self.magnitude)
        found = {name: value / self.tokens for name, value in self.sums.items()}
        return found | {"channel": float(of_channels.max() / of_channels.mean())}


def token_measures(x: Tensor) -> dict[str, Tensor]:
    """Measures of every token of ``x`` ``[n, K]``, ``[n]`` each."""
    norm = x.norm(dim=-1)
    found = {"peak": x.abs().amax(dim=-1) / norm * x.shape[-1] ** 0.5}
    for bits in (8, 4):
        found[f"error of {bits} bits"] = (fake_quantize_activation(x, bits) - x).norm(dim=-1) / norm
    return found


@contextmanager
def measured(model: nn.Module) -> Iterator[dict[tuple[str, bool], list[Inputs]]]:
    """Inside, what o_proj and down_proj read is counted by site, with the transform and without, for each layer."""
    found: dict[tuple[str, bool], list[Inputs]] = {}
    handles = []
    for name, linear in model.named_modules():
        site = name.rpartition(".")[2]
        if site not in HADAMARD_SITES:
            continue
        plain, transformed = Inputs(), Inputs()
        found.setdefault((site, False), []).append(plain)
        found.setdefault((site, True), []).append(transformed)

        def hook(
            module: nn.Module,
            args: tuple[Tensor, ...],
            plain: Inputs = plain,
            transformed: Inputs = transformed,
        ) -> None:
            x = args[0].detach().float().flatten(0, -2)
            block = default_block(x.shape[-1])
            if isinstance(module, BitLinear):
                x = module.norm(x).detach() if module.norm is not None else x
                # b158 of study.py has blocks of one feature, which transform nothing
                block = module.hadamard_block if module.hadamard_block > 1 else block
            plain.add(x)
            transformed.add(hadamard_transform(x, block))

        handles.append(linear.register_forward_pre_hook(hook))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("model", help="A decoder of the Llama kind.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--name", default="", help="What the table calls it; its path otherwise.")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    options = parser.parse_args()

    recipe = load_recipe(options.recipe, options.overrides)
    model, tokenizer = load_model(options.model).eval(), load_tokenizer(options.model)
    heldout = heldout_sequences(recipe, tokenizer)
    with measured(model) as found:
        perplexity = TorchScorer(model, tokenizer).perplexity(heldout)
    rows: list[dict[str, Any]] = []
    for (site, hadamard), layers in found.items():
        by_layer = [layer.means() for layer in layers]
        means = {key: sum(layer[key] for layer in by_layer) / len(by_layer) for key in by_layer[0]}
        rows.append({"site": site, "hadamard": hadamard} | means)
    about = {
        "model": options.name or options.model,
        "width": model.config.hidden_size,
        "perplexity": perplexity,
    }
    tokens = len(heldout) * recipe.corpus.sequence_length
    write_json(options.output, about | {"heldout_tokens": tokens, "rows": rows} | provenance())


if __name__ == "__main__":
    try:
        main()
    except BitDistillError as error:
        sys.exit(f"error: {error}")
