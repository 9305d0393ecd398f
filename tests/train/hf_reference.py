"""Attention states as Hugging Face's own modules make them, for tests of what the taps record."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


@torch.no_grad()
def _attention_inputs(
    model: PreTrainedModel, layer: int, input_ids: Tensor, attention_mask: Tensor
) -> dict[str, Any]:
    """What the family's decoder layer calls the attention module of one layer with."""
    inputs: dict[str, Any] = {}
    attention = model.model.layers[layer].self_attn
    handle = attention.register_forward_pre_hook(
        lambda _, arguments, named: inputs.update(named), with_kwargs=True
    )
    model.model(input_ids, attention_mask=attention_mask, use_cache=False)
    handle.remove()
    return inputs


@torch.no_grad()
def projected_states(
    model: PreTrainedModel, layer: int, input_ids: Tensor, attention_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K, V projections of one layer, ``[B, heads, T, E]``, before any norm or rotation."""
    x = _attention_inputs(model, layer, input_ids, attention_mask)["hidden_states"]
    attention = model.model.layers[layer].self_attn
    width = attention.head_dim
    return tuple(
        projection(x).unflatten(-1, (-1, width)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )


@torch.no_grad()
def rotated_states(
    model: PreTrainedModel, layer: int, input_ids: Tensor, attention_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K, V of one layer as attention receives them: Q and K normed (Qwen3, Gemma 3), then rotated.

    SmolLM3 leaves some layers without rotation.
    """
    query, key, value = projected_states(model, layer, input_ids, attention_mask)
    attention = model.model.layers[layer].self_attn
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    if getattr(attention, "use_rope", True):
        cos, sin = _attention_inputs(model, layer, input_ids, attention_mask)["position_embeddings"]
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
    return query, key, value
