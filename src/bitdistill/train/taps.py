"""Read the Q, K and V states of chosen attention layers while a model runs.

``post_rope`` states are what the attention function receives (after q/k-norm and rotary embedding, key/value heads
not repeated, quantised where the model quantises them); they are read by an attention function registered with
transformers that records its arguments and calls the ordinary one. ``pre_rope`` states are the outputs of the
projections, read by forward hooks.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..model import family_of

TAPPED_SDPA = "bitdistill_tapped_sdpa"

States = tuple[Tensor, Tensor, Tensor]
"""Q, K, V of one layer, each ``[B, heads of that state, T, E]``."""


def attention_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The self-attention modules of a model, in layer order."""
    query = _projections(model)[0]
    layers = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, query)]
    return sorted(layers, key=lambda m: m.layer_idx)  # type: ignore[arg-type, return-value]


def _projections(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the query, key and value projections."""
    family = family_of(model.config.model_type)
    return family.qkv if family else ("q_proj", "k_proj", "v_proj")


def _tapped_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    sink: Callable[[States], None] | None = getattr(module, "relation_sink", None)
    if sink is not None:
        sink((query, key, value))
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


@contextmanager
def capture(
    model: PreTrainedModel, layers: tuple[int, ...], states: Literal["post_rope", "pre_rope"]
) -> Iterator[dict[int, States]]:
    """Record the states of ``layers`` (0-based) in the forward passes made inside the context.

    Yields:
        A dict that a forward pass fills: layer -> states.
    """
    modules = attention_layers(model)
    captured: dict[int, States] = {}
    if states == "pre_rope":
        with _projection_hooks(modules, layers, captured):
            yield captured
        return
    # A student with low-bit states puts a name of its own before that of the function it wraps.
    if layers and not model.config._attn_implementation.endswith(TAPPED_SDPA):
        # Kept from here on: without a sink it is the ordinary function, and the config does not save it.
        AttentionInterface.register(TAPPED_SDPA, _tapped_sdpa)
        AttentionMaskInterface.register(TAPPED_SDPA, sdpa_mask)
        model.set_attn_implementation(TAPPED_SDPA)
    for layer in layers:
        modules[layer].relation_sink = _sink(captured, layer)  # type: ignore[assignment]
    try:
        yield captured
    finally:
        for layer in layers:
            del modules[layer].relation_sink


def run_tapped(
    model: PreTrainedModel,
    batch: Mapping[str, Tensor],
    layers: tuple[int, ...],
    states: Literal["post_rope", "pre_rope"],
) -> tuple[Tensor, dict[int, States]]:
    """Final hidden states ``[B, T, E]`` of a batch, padded or packed, and the states of ``layers``."""
    with capture(model, layers, states) as captured:
        hidden = model.base_model(
            input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False
        ).last_hidden_state
    return hidden, captured


def _sink(captured: dict[int, States], layer: int) -> Callable[[States], None]:
    def record(states: States) -> None:
        captured[layer] = states

    return record


@contextmanager
def _projection_hooks(
    modules: list[nn.Module], layers: tuple[int, ...], captured: dict[int, States]
) -> Iterator[None]:
    outputs: dict[tuple[int, str], Tensor] = {}

    def record(layer: int, name: str, head_dim: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            del module, args
            outputs[layer, name] = output.unflatten(-1, (-1, head_dim)).transpose(1, 2)
            if name == "v_proj":  # projections run in the order q, k, v
                captured[layer] = tuple(outputs[layer, n] for n in ("q_proj", "k_proj", "v_proj"))  # type: ignore[assignment]

        return hook

    handles = [
        getattr(modules[layer], name).register_forward_hook(
            record(layer, name, int(modules[layer].head_dim))  # type: ignore[arg-type]
        )
        for layer in layers
        for name in ("q_proj", "k_proj", "v_proj")
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def matched_layers(
    student_depth: int, teacher_depth: int, layers: tuple[int, ...], teacher_layers: tuple[int, ...]
) -> list[tuple[int, int]]:
    """Pairs of 0-based (student, teacher) layers; without ``teacher_layers`` those at equal relative depth.

    Raises:
        ValueError: a layer does not exist.
    """

    def resolve(layer: int, depth: int, key: str) -> int:
        if not -depth <= layer < depth:
            raise ValueError(f"distill.{key}: there is no layer {layer} in a model of {depth} layers")
        return layer % depth

    students = [resolve(layer, student_depth, "relation_layers") for layer in layers]
    if teacher_layers:
        teachers = [resolve(layer, teacher_depth, "teacher_layers") for layer in teacher_layers]
    else:
        teachers = [round((layer + 1) * teacher_depth / student_depth) - 1 for layer in students]
        teachers = [max(0, layer) for layer in teachers]
    return list(zip(students, teachers, strict=True))
