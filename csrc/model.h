// The weights of a decoder in memory, and the threads that use them.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "config.h"
#include "memory.h"
#include "tensor_source.h"
#include "thread_pool.h"

namespace bitdistill {

// Ternary codes in the room's order: [row_blocks][segments][groups][128].
struct TernaryMatrix {
  size_t rows = 0, columns = 0;
  size_t segment = 0;  // features that share a scale
  size_t segments = 0;
  size_t groups = 0;  // of a segment, in the room's order
  const uint8_t* data = nullptr;
  const float* scale = nullptr;  // one, or [segments][rows rounded up to 32]
  bool scale_per_row = false;

  size_t row_blocks() const { return ceil_div(rows, kRowBlock); }
  size_t padded_rows() const { return row_blocks() * kRowBlock; }
  size_t stride() const { return segments * groups * kGroupBytes; }  // bytes of a row block
  const float* scales_of(size_t segment_index, size_t row_block) const {
    return scale_per_row ? scale + segment_index * padded_rows() + row_block * kRowBlock : scale;
  }
};

enum class Form { f32, bf16, int8, int4 };

// [rows][columns] as in the file: embedding, head, linears left in full precision (f32 or bf16).
struct DenseMatrix {
  size_t rows = 0, columns = 0;
  Form form = Form::f32;
  const uint8_t* data = nullptr;
  const float* scale = nullptr;          // int8: [rows]
  const uint8_t* group_scale = nullptr;  // int4: bf16 [blocks][groups][32], wherever the file has it

  size_t groups() const { return ceil_div(columns, kInt4Group); }
  size_t row_bytes() const {  // int4: an average, rows of a block are interleaved
    return form == Form::int4 ? groups() * kInt4Group / 2
                              : columns * (form == Form::int8   ? 1
                                           : form == Form::bf16 ? 2
                                                                : 4);
  }
  size_t scale_bytes() const { return form == Form::int4 ? groups() * 2 : form == Form::int8 ? 4 : 0; }  // of a row
  Float float_type() const { return form == Form::bf16 ? Float::bf16 : Float::f32; }
};

struct Linear {
  std::string name;
  bool is_ternary = true;
  TernaryMatrix ternary;
  DenseMatrix dense;
  const float* bias = nullptr;
  const float* norm = nullptr;  // RMSNorm of the input
  size_t hadamard_block = 0;    // features of a block of the transform after that; 0: none

  size_t rows() const { return is_ternary ? ternary.rows : dense.rows; }
  size_t columns() const { return is_ternary ? ternary.columns : dense.columns; }
  size_t padded_rows() const { return round_up(rows(), kRowBlock); }
};

struct Layer {
  Linear q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj;
  const float* attention_norm = nullptr;  // of what attention reads
  const float* mlp_norm = nullptr;
  const float* attention_output_norm = nullptr;  // of what is added to the state, where a family has it
  const float* mlp_output_norm = nullptr;
  const float* q_norm = nullptr;
  const float* k_norm = nullptr;
};

struct ModelMemory {
  uint64_t ternary = 0, scales = 0, dense = 0, norms = 0, embedding = 0, head = 0, screen = 0, mapped = 0;
};

class Screen;

class Model {
 public:
  // `screened`: greedy decoding reads an int8 copy of the head first (screen.h). Throws std::invalid_argument
  // (contents), std::system_error (reading), std::bad_alloc.
  Model(std::unique_ptr<TensorSource> source, const std::vector<TensorEntry>& tensors, Config config,
        const KernelTable& room, size_t threads, bool screened);
  ~Model();

  const Config& config() const { return config_; }
  const KernelTable& room() const { return room_; }
  ThreadPool& pool() const { return *pool_; }
  const std::vector<Layer>& layers() const { return layers_; }
  const DenseMatrix& embedding() const { return embedding_; }
  const DenseMatrix& head() const { return head_; }
  const Screen* screen() const { return screen_.get(); }  // null: none
  const float* final_norm() const { return final_norm_; }
  const ModelMemory& memory() const { return memory_; }
  // Bytes that one decode step reads: weights, head (the copy that screens it, if there is one), one embedding row, and
  // the keys and values of `context` tokens.
  uint64_t decode_bytes(size_t context, Cache kv) const;

 private:
  friend class Loader;
  Config config_;
  const KernelTable& room_;
  std::unique_ptr<ThreadPool> pool_;
  std::unique_ptr<TensorSource> source_;  // kept: matrices may point into its pages
  Pages matrices_;
  std::vector<Array<float>> floats_;
  std::vector<Layer> layers_;
  DenseMatrix embedding_, head_;
  std::unique_ptr<Screen> screen_;
  const float* final_norm_ = nullptr;
  ModelMemory memory_;
};

}  // namespace bitdistill
