// The forward pass of one chunk of tokens, run by every thread side by side (SPMD): each takes its share of a phase,
// and barriers divide the phases. For one token, cheap work (norms, quantisation) is done by every thread for itself,
// which saves a barrier; the order of all sums is the same for any number of threads, and so are the results.
#pragma once

#include <span>

#include "kv_cache.h"
#include "workspace.h"

namespace bitdistill {

constexpr size_t kTokensDealt = 8;  // tokens of a chunk of work that is done token by token

// A token, where it stands in its sequence, and the keys and values of that sequence.
struct Row {
  int32_t token;
  size_t position;
  KvCache* cache;
};
// 1..kChunk tokens that go through the layers together. Those of one sequence stand side by side, in order.
using Chunk = std::span<const Row>;

// Before the threads start: cosine and sine of the chunk's positions, and how attention is cut into tiles.
void begin_chunk(const Config& config, Chunk chunk, Workspace& work);
// Embedding and all layers: leaves the states before the last norm in work.state.
void run_layers(const Model& model, Chunk chunk, Workspace& work, Worker& worker);

// The same piece by piece, on states [tokens][work.state_stride] that lie elsewhere. Each ends with a barrier.
void embed(const Model& model, Chunk chunk, float* state, Workspace& work, Worker& worker);
void run_layer(const Model& model, size_t index, Chunk chunk, float* state, Workspace& work, Worker& worker);
// Of a layer only what later tokens need of it: the chunk's keys and values.
void store_layer(const Model& model, size_t index, Chunk chunk, float* state, Workspace& work, Worker& worker);

// logits[t][0..V) of `count` states, [count][work.state_stride], a share of the vocabulary a thread. `normed` receives
// the states after the last norm, [count][hidden_size]. Ends without a barrier.
void run_head(const Model& model, const float* states, size_t count, Workspace& work, float* normed, float* logits,
              Worker& worker);

// One phase of the decoder, in attention.cc: rotates queries and keys, stores keys and values, attends.
void run_attention(const Model& model, size_t layer, Chunk chunk, Workspace& work, Worker& worker);
// Of it only the storing.
void store_keys(const Model& model, size_t layer, Chunk chunk, Workspace& work, Worker& worker);

// In head.cc, also used on their own by tests.
void table_row(const KernelTable& room, const DenseMatrix& table, size_t row, float* out);
// x ~= high * high_scale + low * low_scale, to 15 bits: with it a head of int8 or int4 costs two exact integer dot
// products and adds no error of its own.
struct SplitCodes {
  SplitCodes(const float* x, size_t n, size_t padded);
  std::vector<int8_t> high, low;  // zero beyond n
  float high_scale, low_scale;
  std::vector<int32_t> offset;

  SplitState view() const { return {high.data(), low.data(), offset.data()}; }
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
