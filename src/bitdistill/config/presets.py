"""Published shapes and schedules that ``base.preset`` starts from; keys written in the recipe win."""

from typing import Any

# The training tips ("The Era of 1-bit LLMs: Training Tips, Code, FAQ"): two linear stages, weight decay in the first.
_TIPS = {
    "architecture": "bitnet",
    "schedule": "two_stage",
    "two_stage_drop": 2 / 3,
    "weight_decay": 0.1,
    "weight_decay_schedule": "half_then_zero",
}
# BitNet v2 (2504.18415), tables 8 and 9: two stages as in the tips, INT4 activations in the last 5 % of the steps.
# The tokenizer is not named; the size is LLaMA's. 375 of 100,000 steps (of a million tokens) are warm-up.
_V2 = _TIPS | {
    "architecture": "bitnet_v2",
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "warmup_ratio": 0.00375,
    "int4_activations_ratio": 0.05,
}
# Their models are 24 or 26 layers with a LLaMA vocabulary; the layout here is that of 2B4T (squared ReLU, SubLN).
_TIPS_SHAPE = {"vocab_size": 32000, "tie_word_embeddings": False}
_SMALL_V2 = {
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "warmup_ratio": 0.05,
}
_SMALL = {"head_dim": 32, "num_key_value_heads": 1, "max_position_embeddings": 1024}

BASE_PRESETS: dict[str, dict[str, Any]] = {
    "bitnet-2b4t": {
        "architecture": "bitnet",
        "vocab_size": 128256,
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_hidden_layers": 30,
        "num_attention_heads": 20,
        "num_key_value_heads": 5,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        # The report names the schedules and no learning rate: the rate is the tips' for 3B, the drop ours.
        "schedule": "two_stage_cosine",
        "learning_rate": 1.2e-3,
        "two_stage_drop": 1 / 3,
        "weight_decay": 0.1,
        "weight_decay_schedule": "cosine_then_zero",
    },
    "bitnet-700m": _TIPS
    | _TIPS_SHAPE
    | {
        "hidden_size": 1536,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 24,
        "num_key_value_heads": 24,
        "head_dim": 64,
        "learning_rate": 1.5e-3,
    },
    "bitnet-1.3b": _TIPS
    | _TIPS_SHAPE
    | {
        "hidden_size": 2048,
        "intermediate_size": 5460,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 64,
        "learning_rate": 1.2e-3,
    },
    "bitnet-3b": _TIPS
    | _TIPS_SHAPE
    | {
        "hidden_size": 3200,
        "intermediate_size": 8640,
        "num_hidden_layers": 26,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 100,
        "learning_rate": 1.2e-3,
    },
    "bitnet-v2-400m": _V2
    | {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 64,
        "learning_rate": 1.8e-3,
    },
    "bitnet-v2-1.3b": _V2
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 18,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 64,
        "learning_rate": 1.2e-3,
    },
    "bitnet-v2-3b": _V2
    | {
        "hidden_size": 4096,
        "intermediate_size": 8192,
        "num_hidden_layers": 20,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "learning_rate": 1.2e-3,
        "two_stage_drop": 6.4e-4 / 1.2e-3,
    },
    "bitnet-v2-7b": _V2
    | {
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "learning_rate": 1e-3,
        "two_stage_drop": 0.6,
    },
    # For a CPU: named by parameters outside the embedding, weights drawn at about hidden_size^-0.5.
    "bitnet-1.5m": _TIPS
    | _SMALL
    | {
        "vocab_size": 4096,
        "hidden_size": 160,
        "intermediate_size": 432,
        "num_hidden_layers": 6,
        "num_attention_heads": 5,
        "initializer_range": 0.08,
        "learning_rate": 4e-3,
    },
    "bitnet-5m": _TIPS
    | _SMALL
    | {
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 7,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "initializer_range": 0.06,
        "learning_rate": 3e-3,
    },
    "bitnet-v2-1.5m": _V2
    | _SMALL_V2
    | {
        "vocab_size": 4096,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "initializer_range": 0.09,
        "learning_rate": 4e-3,
    },
    "bitnet-v2-5m": _V2
    | _SMALL_V2
    | {
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "initializer_range": 0.06,
        "learning_rate": 3e-3,
    },
}


def with_base_preset(section: dict[str, Any], preset: str) -> dict[str, Any]:
    """A ``[base]`` section on top of a preset, without what the section's own keys leave no use for."""
    start = dict(BASE_PRESETS[preset])
    if section.get("tokenizer"):
        del start["vocab_size"]
    if not str(section.get("schedule", "two_stage")).startswith("two_stage"):
        del start["two_stage_drop"]
    return start | section
