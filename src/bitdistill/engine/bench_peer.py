"""llama.cpp behind the protocol of ``bench_worker``: random weights of a shape in a GGUF file, one format a process.

Ternary matrices are TQ2_0 (or everything bf16), the tied embedding and head Q6_K beside TQ2_0, as llama-quantize makes
them.
"""

import ctypes
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from .bench_process import serve
from .bench_worker import Stopwatch
from .loading import linear_shapes
from .shapes import find_shape

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
CONTEXT = 1024


def write_gguf(path: Path, shape: dict[str, Any], form: str) -> None:
    """Random weights of a shape under llama.cpp's names."""
    import gguf

    is_bitnet = shape["model_type"] == "bitnet"
    writer = gguf.GGUFWriter(path, "bitnet" if is_bitnet else "qwen3", use_temp_file=True)
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_key_length(shape["head_dim"])
    writer.add_value_length(shape["head_dim"])
    writer.add_rope_dimension_count(shape["head_dim"])
    writer.add_rope_freq_base(shape["rope_theta"])
    writer.add_layer_norm_rms_eps(shape["rms_norm_eps"])
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    rng = np.random.default_rng(0)
    kinds = gguf.GGMLQuantizationType

    def matrix(name: str, rows: int, columns: int, kind: str) -> None:
        if kind == "BF16":
            # Bit patterns of values near 1/64: the speed does not depend on them.
            data = rng.integers(0x3C00, 0x3C80, (rows, columns), dtype=np.uint16).view(np.uint8)
        elif kind == "Q6_K":  # 256 weights: 192 bytes of 6-bit codes, 16 int8 scales, the scale of these
            data = rng.integers(0, 256, (rows, columns // 256, 210), dtype=np.uint8)
            data[..., 208:] = np.array([1e-4], np.float16).view(np.uint8)
        else:  # 256 weights: 64 bytes of 2-bit codes in {0, 1, 2}, then the scale
            data = np.zeros((rows, columns // 256, 66), np.uint8)
            codes = rng.integers(0, 3, (rows, columns // 256, 64, 4), dtype=np.uint8)
            data[..., :64] = (codes << np.array([0, 2, 4, 6], np.uint8)).sum(-1, dtype=np.uint8)
            data[..., 64:] = np.array([0.02], np.float16).view(np.uint8)
        writer.add_tensor(name, data.reshape(rows, -1), raw_dtype=kinds[kind])

    def vector(name: str, size: int) -> None:
        writer.add_tensor(name, np.ones(size, np.float32))

    matrix(
        "token_embd.weight", shape["vocab_size"], shape["hidden_size"], "Q6_K" if form == "TQ2_0" else form
    )
    vector("output_norm.weight", shape["hidden_size"])
    for layer in range(shape["num_hidden_layers"]):
        prefix = f"blk.{layer}"
        for linear, (rows, columns) in linear_shapes(shape).items():
            matrix(f"{prefix}.{_NAMES[linear]}.weight", rows, columns, form)
        vector(f"{prefix}.attn_norm.weight", shape["hidden_size"])
        vector(f"{prefix}.ffn_norm.weight", shape["hidden_size"])
        if is_bitnet:
            vector(f"{prefix}.attn_sub_norm.weight", shape["hidden_size"])
            vector(f"{prefix}.ffn_sub_norm.weight", shape["intermediate_size"])
        else:
            vector(f"{prefix}.attn_q_norm.weight", shape["head_dim"])
            vector(f"{prefix}.attn_k_norm.weight", shape["head_dim"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """llama.cpp through its C interface; random tokens need no vocabulary."""

    def __init__(self, shape: str, threads: int, form: str) -> None:
        import llama_cpp

        self.lib = llama_cpp
        self.vocabulary = find_shape(shape)["vocab_size"]
        self.rng = np.random.default_rng(0)
        # llama.cpp prints to both streams; the protocol owns standard output.
        callback = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
        self._callback = callback
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(path, find_shape(shape), form)
            settings = llama_cpp.llama_model_default_params()
            settings.use_mmap = False
            settings.n_gpu_layers = 0
            started = time.perf_counter()
            self.model = llama_cpp.llama_load_model_from_file(str(path).encode(), settings)
            self.load_s = time.perf_counter() - started
        if not self.model:
            raise ValueError(f"llama.cpp does not load the shape {shape} in {form}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = CONTEXT, 512, 512
        options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.llama_new_context_with_model(self.model, options)

    def facts(self) -> dict[str, Any]:
        """What does not change from sample to sample."""
        return {"load_s": self.load_s}

    def _read(self, count: int) -> None:
        tokens = (ctypes.c_int32 * count)(*self.rng.integers(0, self.vocabulary, count).tolist())
        status = self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(tokens, count))
        if status:
            raise ValueError(f"llama_decode ended with status {status}")
        self.lib.llama_get_logits_ith(self.context, -1)  # waits until they are there

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request of the protocol."""
        if "prefill" in request:
            self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        with Stopwatch() as watch:
            for count in [request["prefill"]] if "prefill" in request else [1] * request["decode"]:
                self._read(count)
        return watch.figures()


if __name__ == "__main__":
    serve(LlamaCpp)
