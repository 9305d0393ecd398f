// The forward pass of one chunk of tokens, run by every thread side by side (SPMD): each takes its share of a phase,
// and barriers divide the phases. For one token, cheap work (norms, quantisation) is done by every thread for itself,
// which saves a barrier; the order of all sums is the same for any number of threads, and so are the results.
#pragma once

#include "kv_cache.h"
#include "workspace.h"

namespace bitdistill {

constexpr size_t kTokensDealt = 8;  // tokens of a chunk of work that is done token by token

struct Chunk {
  const int32_t* tokens;
  size_t count;     // 1..kChunk
  size_t position;  // of the first
};

// Embedding and all layers: leaves the states before the last norm in work.state. Fills cosine and sine first.
void rotary_table(const Config& config, const Chunk& chunk, Workspace& work);
void run_layers(const Model& model, const Chunk& chunk, KvCache& cache, Workspace& work, Worker& worker);

// logits[t][0..V) of states [first, first + count) of the chunk, a share of the vocabulary a thread. `normed` receives
// the states after the last norm, [count][hidden_size]. Ends without a barrier.
void run_head(const Model& model, size_t first, size_t count, Workspace& work, float* normed, float* logits,
              Worker& worker);

// One phase of the decoder, in attention.cc: rotates queries and keys, stores keys and values, attends.
void run_attention(const Model& model, size_t layer, const Chunk& chunk, KvCache& cache, Workspace& work,
                   Worker& worker);

// In head.cc, also used on their own by tests.
void table_row(const KernelTable& room, const DenseMatrix& table, size_t row, float* out);
// x ~= high * high_scale + low * low_scale, to 15 bits: with it a head of int8 or int4 costs two exact integer dot
// products and adds no error of its own.
struct SplitCodes {
  SplitCodes(const float* x, size_t n, size_t padded);
  std::vector<int8_t> high, low;  // zero beyond n
  float high_scale, low_scale;
  std::vector<int32_t> offset;  // what int4 weights, stored with 8 added, take off again: by group
};
// States [tokens][hidden_size] as a head takes them: split where it is int8 or int4.
struct HeadInput {
  HeadInput(const DenseMatrix& head, const float* x, size_t tokens);
  const float* x;
  size_t tokens;
  std::vector<SplitCodes> split;
};
// logits[t * vocabulary + r] of a range of rows that starts at a multiple of kInt4Rows.
void head_rows(const KernelTable& room, const DenseMatrix& head, const HeadInput& input, Range rows, float* logits);

}  // namespace bitdistill
