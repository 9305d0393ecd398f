"""Attention states as Hugging Face's own modules make them, for tests of what the taps record."""

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


@torch.no_grad()
def projected_states(
    model: PreTrainedModel, layer: int, input_ids: Tensor, attention_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K, V projections of one layer, ``[B, heads, T, E]``, before any norm or rotation."""
    output = model.model(input_ids, attention_mask=attention_mask, output_hidden_states=True, use_cache=False)
    block = model.model.layers[layer]
    x = block.input_layernorm(output.hidden_states[layer])
    attention = block.self_attn
    width = attention.head_dim
    return tuple(
        projection(x).unflatten(-1, (-1, width)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )


@torch.no_grad()
def rotated_states(
    model: PreTrainedModel, layer: int, input_ids: Tensor, attention_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K, V of one layer as attention receives them: normed (Qwen3), then Q and K rotated."""
    query, key, value = projected_states(model, layer, input_ids, attention_mask)
    attention = model.model.layers[layer].self_attn
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    positions = torch.arange(input_ids.shape[1])[None]
    cos, sin = model.model.rotary_emb(value, positions)
    return *apply_rotary_pos_emb(query, key, cos, sin), value
