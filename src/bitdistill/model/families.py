"""The table of model families: facts about Hugging Face classes, no behaviour.

A new decoder family is a new row, provided its linears are ``nn.Linear`` modules inside the decoder layers and its
logits are its head's output, unchanged. So is an encoder, with a masked-LM class and a classification class.
``docs/adding_a_family.md`` says which facts to look up.
"""

from dataclasses import dataclass

_GATED_IN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_GATED_OUT = ("o_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row: which classes a family has and which of its linears turn ternary."""

    model_type: str
    """``model_type`` of the full-precision config; the student's is ``bit_`` + this."""
    config_class: str
    """Config class name in ``transformers``."""
    causal_lm_class: str = ""
    """Causal-LM class name in ``transformers``; an encoder has none."""
    masked_lm_class: str = ""
    """Masked-LM class name of an encoder."""
    classification_class: str = ""
    """Sequence-classification class name of an encoder."""
    head_transform: str = ""
    """Path, in the masked-LM class, of what stands between the last hidden states and the output embeddings."""
    linears_in: tuple[str, ...] = _GATED_IN
    """Ends of the paths of ternary linears that read the residual stream; query, key and value first."""
    linears_out: tuple[str, ...] = _GATED_OUT
    """Ends of the paths of ternary linears that write to it, attention's first: the SubLN sites of the paper."""
    norm_eps: str = "rms_norm_eps"
    """Config field whose epsilon the new norms use."""
    input_norms: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("input_layernorm", _GATED_IN[:3]),
        ("post_attention_layernorm", _GATED_IN[3:]),
    )
    """Norms of a layer whose output these linears read and nothing else does; an encoder, whose norms stand behind the
    residual sum, has none."""
    gain_offset: float = 0.0
    """What those norms add to their weight: Gemma's multiply by ``1 + weight``."""
    feeds: tuple[tuple[str, str], ...] = (("v_proj", "o_proj"), ("up_proj", "down_proj"))
    """Pairs of linears: each output of the first reaches the second as its own inputs, times what does not depend on
    it, where both are equally wide."""
    text_checkpoint: str = ""
    """A text-only checkpoint on the hub, to name when someone gives a multimodal one with this decoder inside."""

    def __post_init__(self) -> None:
        if len(self.linears_out) != 2:
            raise ValueError(
                f"{self.model_type}: linears_out are two, the attention's and the feed-forward's"
            )

    @property
    def student_type(self) -> str:
        return f"bit_{self.model_type}"

    @property
    def is_encoder(self) -> bool:
        return bool(self.masked_lm_class)

    @property
    def model_classes(self) -> dict[str, str]:
        """Auto class -> the family's class of that kind, by their names in ``transformers``."""
        if self.is_encoder:
            return {
                "AutoModelForMaskedLM": self.masked_lm_class,
                "AutoModelForSequenceClassification": self.classification_class,
            }
        return {"AutoModelForCausalLM": self.causal_lm_class}

    @property
    def linears(self) -> tuple[str, ...]:
        return self.linears_in + self.linears_out

    @property
    def qkv(self) -> tuple[str, ...]:
        """Names of the projections of an attention module."""
        return self.linears_in[:3]


FAMILIES = (
    Family(model_type="llama", config_class="LlamaConfig", causal_lm_class="LlamaForCausalLM"),
    Family(model_type="qwen3", config_class="Qwen3Config", causal_lm_class="Qwen3ForCausalLM"),
    Family(model_type="qwen2", config_class="Qwen2Config", causal_lm_class="Qwen2ForCausalLM"),
    Family(model_type="mistral", config_class="MistralConfig", causal_lm_class="MistralForCausalLM"),
    Family(model_type="smollm3", config_class="SmolLM3Config", causal_lm_class="SmolLM3ForCausalLM"),
    Family(
        model_type="gemma3_text",
        config_class="Gemma3TextConfig",
        causal_lm_class="Gemma3ForCausalLM",
        input_norms=(("input_layernorm", _GATED_IN[:3]), ("pre_feedforward_layernorm", _GATED_IN[3:])),
        gain_offset=1.0,
        text_checkpoint="google/gemma-3-1b-pt",
    ),
    Family(
        model_type="bert",
        config_class="BertConfig",
        masked_lm_class="BertForMaskedLM",
        classification_class="BertForSequenceClassification",
        head_transform="cls.predictions.transform",
        linears_in=("query", "key", "value", "intermediate.dense"),
        # With its parent's name: the pooler and the masked-LM head have a "dense" too, which stay full precision.
        linears_out=("attention.output.dense", "output.dense"),
        norm_eps="layer_norm_eps",
        input_norms=(),
        feeds=(),
    ),
)


def find_family(model_type: str) -> Family | None:
    """The row of a full-precision ``model_type``, or None."""
    return next((family for family in FAMILIES if family.model_type == model_type), None)


def family_of(model_type: str) -> Family | None:
    """The row of a ``model_type``, full precision or a student's, or None."""
    return next((f for f in FAMILIES if model_type in (f.model_type, f.student_type)), None)


def ends_in(path: str, names: tuple[str, ...]) -> bool:
    """Whether the last components of a module path are one of ``names``."""
    return any(f".{path}".endswith(f".{name}") for name in names)
