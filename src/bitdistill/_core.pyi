"""The compiled engine core. Runs decoders of ternary linears; knows no files but one, no tokenizer, no JSON.

Who does what
    Python (numpy, no torch): reads ``config.json`` and the safetensors header, checks them, names every problem,
    turns RoPE settings into frequencies, tokenises, renders chats.
    The core: takes one data file, where each tensor lies in it, and plain settings; copies (or shares) and, where the
    CPU's kernels want it, rearranges the weights; computes.

Every function that works longer than a microsecond releases the GIL. A ``Model`` and its threads may serve many
sessions; calls into one model run one at a time, in any Python thread. Nothing here is fork-safe after a model is made.

Errors: ``ValueError`` for wrong arguments and for files whose contents do not fit (the message names the tensor),
``OSError`` for a file that cannot be read, ``RuntimeError`` for an ISA that this CPU or this build lacks,
``MemoryError``. No input makes the core abort.
"""

from collections.abc import Sequence
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

# --- instruction sets ---

def compiled_isas() -> list[str]:
    """The kernel rooms in this build, slowest first.

    On x86-64 ``scalar``, ``avx2``, ``avx_vnni``, its twin for tests ``avx_vnni_evex``, ``avx512_vnni``,
    ``avx512_vbmi``; on AArch64 ``scalar``, ``neon_dotprod``.
    """

def available_isas() -> list[str]:
    """The compiled rooms that this CPU can run, slowest first."""

def select_isa(forced: str | None = None, features: Sequence[str] | None = None) -> str:
    """The room that a new model uses: ``forced``, or else the fastest available one. ``scalar`` and
    ``avx_vnni_evex`` come by name only.

    ``features`` replaces what the CPU reports (``avx2``, ``fma``, ``f16c``, ``avx512f``, ...), for tests.

    Raises:
        RuntimeError: ``forced`` is unknown or this CPU lacks it, or nothing but ``scalar`` would run and it was not
            asked for by name.
    """

# --- weights ---

@final
class Tensor:
    """Where one tensor lies in the data file. ``dtype`` is the safetensors name: U8, I8, BF16, F32."""

    def __init__(
        self,
        name: str,
        dtype: str,
        shape: Sequence[int],
        offset: int,
        nbytes: int,
        checksum: int | None = None,
    ) -> None: ...

@final
class Config:
    """Geometry and arithmetic of a decoder. Fields bear the names of ``config.json`` where it has them."""

    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        max_context: int,
        rms_norm_eps: float,
        hidden_act: Literal["silu", "relu2", "gelu_tanh"],
        ropes: Sequence[tuple[Sequence[float], float]],
        layer_ropes: Sequence[int | None] | None = None,
        layer_windows: Sequence[int] | None = None,
        attention_scale: float | None = None,
        embedding_scale: float = 1.0,
        tie_word_embeddings: bool = False,
        block_size: int | None = None,
        activation_rounding: Literal["divide", "multiply"] = "divide",
        activation_bits: int = 8,
        hadamard: dict[str, int] = {},
        query_bits: int = 16,
        kv_bits: int = 16,
    ) -> None:
        """``ropes``: head_dim / 2 RoPE frequencies, after any scaling, and the factor of cos and sin.

        ``layer_ropes``: which of them a layer uses, None for none; the first everywhere if not given.
        ``layer_windows``: the last tokens that a token of a layer sees, itself included; 0 for all.
        ``attention_scale``: of the products of queries and keys, ``head_dim ** -0.5`` if not given.
        ``block_size``: input features per weight scale where scales are per block.
        ``activation_bits``: 8 (absmax) or 4 (absmean, BitNet v2), of all ternary linears.
        ``hadamard``: of ``o_proj`` and ``down_proj`` the block of the transform of their inputs, after their norms; a
        linear that is not ternary has none. ``query_bits`` (16, 8, 4) and ``kv_bits`` (16, 8, 4, 3): what queries, keys
        and values are rounded to after rotation, 16 for not at all; a cache of fewer bits than ``kv_bits`` rounds to
        its own. Keys and values of position 0 keep eight.
        """

@final
class Model:
    """Weights in memory and the threads that use them. Immutable, shared by sessions.

    Tensor names are Hugging Face's (docs/format.md). Which optional tensors are there decides what runs: ``bias``,
    ``norm.weight`` under a linear, ``q_norm`` and ``k_norm``, ternary (U8), BF16 or F32 linears, a BF16, F32, I8 or
    int4 head. BitNet's ``attn_sub_norm`` and ``ffn_sub_norm`` come under the names ``self_attn.o_proj.norm.weight`` and
    ``mlp.down_proj.norm.weight``. A tensor that no part of the decoder uses is an error.
    """

    def __init__(
        self,
        path: str | None,
        tensors: Sequence[Tensor],
        config: Config,
        *,
        threads: int = 0,
        mmap: bool = False,
        isa: str | None = None,
        seed: int = 0,
        screened: bool = False,
    ) -> None:
        """Load. ``threads`` 0: one for each CPU this process may use. ``isa`` None: ``BITDISTILL_ISA`` or the best.

        ``mmap``: use the file's pages in place where the room's order is the file's; checksums are then not checked,
        and the file must not change while the model lives. ``path`` None: random weights of these shapes, for
        measurements; offsets do not count, ``seed`` decides. ``screened``: greedy decoding reads an int8 copy of the
        bf16 or f32 head first, and finds the same tokens.
        """

    @property
    def isa(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def config(self) -> dict[str, Any]: ...
    def memory(self) -> dict[str, int]:
        """Bytes by part: ``ternary``, ``scales``, ``dense`` (skipped linears), ``norms`` (and biases), ``embedding``,
        ``head`` (0 when tied), ``screen`` (the copy that screens the head), ``mapped`` (of all these, file pages)."""

    def decode_bytes(self, context: int = 0, kv: str = "fp16") -> int:
        """Bytes that one decode step reads from memory: weights, head (or its screen), and keys and values of
        ``context`` tokens in the form ``kv``."""

# --- text ---

@final
class Sampler:
    """How the next token is chosen; holds the state of its random numbers.

    ``temperature`` 0 is greedy (the lowest id wins a tie). ``top_k`` 0 and ``top_p`` 1 are off; top_k cuts first.
    """

    def __init__(
        self, *, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0
    ) -> None: ...
    def sample(self, logits: NDArray[np.float32]) -> int:
        """One token from logits ``[V]``. Raises ValueError when none is finite."""

@final
class Session:
    """One sequence: its KV cache and its position.

    ``kv`` is how keys and values are kept: fp16, int8, int4, int3 or fp32. The cache grows with the text, up to
    ``context`` tokens.
    """

    def __init__(self, model: Model, *, context: int = 0, kv: str = "fp16") -> None:
        """``context`` 0: the model's ``max_context``, which is also the most it may be."""

    def start_profile(self) -> None:
        """Count the time of each phase from here on; what was counted before is forgotten."""

    @property
    def profile(self) -> dict[str, float]:
        """Seconds of forward passes by phase: embed, norm (with quantisation), qkv, attention, o_proj, gate_up,
        down_proj, head. Empty before ``start_profile``."""

    @property
    def rescored_rows(self) -> float:
        """Of screened decoding: rows of the head that were scored in full, a token."""

    @property
    def position(self) -> int:
        """Tokens in the sequence so far, generated ones included."""

    @property
    def context(self) -> int: ...
    def memory(self) -> dict[str, int]:
        """Bytes: ``kv_cache`` that the text so far takes, ``scratch`` at most (pages come when they are used)."""

    def forward(self, tokens: NDArray[np.int32], *, all_positions: bool = False) -> NDArray[np.float32]:
        """Append ``tokens``; logits ``[V]`` after the last of them, or ``[len(tokens), V]``.

        Raises:
            ValueError: no tokens, an id outside the vocabulary, more than fits the context. The session is unchanged.
        """

    def score(self, tokens: NDArray[np.int32], first: int = 1) -> NDArray[np.float32]:
        """Append ``tokens``; log p(tokens[i] | everything before), natural logarithm, for i in [first, len(tokens)).

        ``first`` 0 needs a session that already holds text. Holds no ``[len, V]`` array.
        """

    def decode(
        self, sampler: Sampler, max_new_tokens: int, stop: Sequence[int] = ()
    ) -> tuple[list[int], Literal["stop", "length", "context"]]:
        """Generate up to ``max_new_tokens``; the tokens and why it ended. A stop token ends the text and is not in it.

        Continues from the last ``forward`` or ``decode``; the same tokens come whether asked for at once or one by one.
        """

    def truncate(self, position: int) -> None:
        """Forget everything after the first ``position`` tokens. Call ``forward`` before the next ``decode``."""

    def forward_tapped(
        self, tokens: NDArray[np.int32]
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
        """``forward(all_positions=True)`` and what went on inside, for parity tests.

        Taps: ``<linear>.code`` int8 ``[T, K]`` and ``<linear>.scale`` float32 ``[T]`` for every ternary linear,
        ``model.layers.<i>`` float32 ``[T, D]`` after each layer, ``model.norm`` after the last norm.
        """

class LabelHead:
    """Logits of a few tokens after texts, for classification; a session's to the bit, for less work and memory.

    Holds keys and values of one layer at a time, computes the last layer for a text's last token alone, and of the head
    only the labels' rows. Short texts share passes over the weights.
    """

    def __init__(self, model: Model, labels: Sequence[int], *, kv: str = "fp16") -> None:
        """``labels``: token ids, at least one."""

    def logits(self, texts: list[NDArray[np.int32]]) -> NDArray[np.float32]:
        """``[len(texts), len(labels)]``: of each label as the token after each text.

        Raises:
            ValueError: an empty text, an id outside the vocabulary, more than fits the context.
        """

def forward_together(sessions: list[Session], tokens: list[NDArray[np.int32]]) -> NDArray[np.float32]:
    """Append tokens to several sequences of one model in one pass; logits ``[S, V]`` of the last token of each.

    Each is as if it were alone, to the last bit. Raises ValueError, all unchanged: a session comes twice, they belong
    to different models, or tokens that ``forward`` refuses.
    """

def decode_together(
    sessions: list[Session], samplers: list[Sampler], max_new_tokens: int, stop: Sequence[int] = ()
) -> list[tuple[list[int], Literal["stop", "length", "context"]]]:
    """``decode`` of several sequences of one model, a token of each in one pass."""

# --- the machine ---

def probe_bandwidth(threads: int, seconds: float = 0.3) -> float:
    """Memory read bandwidth in GB/s: one large sequential stream per thread."""

def probe_int8(threads: int, seconds: float = 0.2, isa: str | None = None) -> float:
    """Peak of the room's widest int8 dot product on registers, in 10^9 multiply-adds per second."""

def memory_usage() -> dict[str, int]:
    """``resident`` and ``peak_resident`` bytes of this process."""

# --- single kernels, for tests and measurements ---

def pack_random(rows: int, columns: int, block_size: int = 0, seed: int = 0) -> NDArray[np.uint8]:
    """Packed ``t5x32-v1`` bytes ``[RB, S, G, 128]`` of uniformly random trits."""

def ternary_dot(
    packed: NDArray[np.uint8],
    rows: int,
    columns: int,
    code: NDArray[np.int8],
    *,
    isa: str,
    kernel: Literal["gemv", "gemm", "gemm_int4"],
    block_size: int = 0,
) -> NDArray[np.int32]:
    """Integer dot products ``[M, S, N]`` of activation codes ``[M, K]`` with packed weights, per scale segment.

    ``gemm_int4`` looks codes of -8..7 up: in rooms that have it, for matrices of one segment; ValueError elsewhere.
    """

def ternary_linear(
    packed: NDArray[np.uint8],
    weight_scale: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    rows: int,
    columns: int,
    code: NDArray[np.int8],
    act_scale: NDArray[np.float32],
    *,
    isa: str,
    threads: int = 1,
    block_size: int = 0,
) -> NDArray[np.float32]:
    """``[M, N]``: the linear as the decoder runs it, gemv for one row of codes and gemm for more."""

def norm_quantize(
    x: NDArray[np.float32],
    gain: NDArray[np.float32] | None,
    eps: float,
    *,
    isa: str,
    rounding: Literal["divide", "multiply"] = "divide",
    bits: int = 8,
    hadamard_block: int = 0,
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """RMSNorm (unless ``gain`` is None), the Hadamard transform (unless its block is 0), then absmax INT8 or, with 4
    ``bits``, absmean INT4, per row: codes ``[M, K]`` and scales ``[M]``."""

def hadamard(x: NDArray[np.float32], block: int, *, isa: str) -> NDArray[np.float32]:
    """Orthonormal Hadamard transform of every ``block`` features of ``[M, K]``, natural order."""

def attend(
    query: NDArray[np.float32],
    key: NDArray[np.float32],
    value: NDArray[np.float32],
    scale: float,
    *,
    isa: str,
    kv: str = "fp16",
    window: int = 0,
) -> NDArray[np.float32]:
    """Causal attention ``[M, H, E]`` of the last M of T positions; key and value ``[T, KV, E]`` go through a cache.

    ``window``: the last positions that each sees, itself included; 0 for all.
    """

def head_logits(
    weight: NDArray[Any], weight_scale: NDArray[Any] | None, x: NDArray[np.float32], *, isa: str
) -> NDArray[np.float32]:
    """``[M, V]`` logits of states ``[M, D]``.

    Weight: F32 or BF16 (as uint16) ``[V, D]``; I8 with F32 scales ``[V]``; int4 as uint8
    ``[V / 32, D / 64, 1024]`` with BF16 scales ``[V / 32, D / 64, 32]``, see ``layout.pack_int4``.
    """
