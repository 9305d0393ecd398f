"""The table of model families: facts about Hugging Face classes, no behaviour.

A new decoder family is a new row, provided its linears are ``nn.Linear`` modules inside the decoder layers.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row: which classes a family has and which of its linears turn ternary."""

    model_type: str
    """``model_type`` of the full-precision config; the student's is ``bit_`` + this."""
    config_class: str
    """Config class name in ``transformers``."""
    causal_lm_class: str
    """Causal-LM class name in ``transformers``."""
    linears_in: tuple[str, ...]
    """Names (last path component) of ternary linears that read the residual stream."""
    linears_out: tuple[str, ...]
    """Names of ternary linears that write to it: the SubLN sites of the paper."""
    norm_eps: str = "rms_norm_eps"
    """Config field whose epsilon the new norms use."""

    @property
    def student_type(self) -> str:
        return f"bit_{self.model_type}"

    @property
    def linears(self) -> tuple[str, ...]:
        return self.linears_in + self.linears_out


_GATED_IN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_GATED_OUT = ("o_proj", "down_proj")

FAMILIES = (
    Family(
        model_type="llama",
        config_class="LlamaConfig",
        causal_lm_class="LlamaForCausalLM",
        linears_in=_GATED_IN,
        linears_out=_GATED_OUT,
    ),
    Family(
        model_type="qwen3",
        config_class="Qwen3Config",
        causal_lm_class="Qwen3ForCausalLM",
        linears_in=_GATED_IN,
        linears_out=_GATED_OUT,
    ),
)


def find_family(model_type: str) -> Family | None:
    """The row of a full-precision ``model_type``, or None."""
    return next((family for family in FAMILIES if family.model_type == model_type), None)
