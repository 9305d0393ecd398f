// Buffers of one session, for up to kChunk tokens at a time. Pages come when touched: a session that only decodes pays
// for one token's worth.
#pragma once

#include <map>
#include <optional>
#include <string>

#include "linear.h"
#include "profile.h"

namespace bitdistill {

// Tokens that go through the layers together: activations of a chunk stay in the last-level cache, and weights are read
// once for all of them. Whole tiles of the widest gemm: a rest of a few tokens costs nearly as much as a tile.
constexpr size_t kChunk = 22 * kMaxTile;

// Linears that read the same state (q, k, v) need up to three inputs, where each has a norm of its own.
constexpr size_t kInputs = 3;

// What a thread needs for itself.
struct Scratch {
  Array<float> state;   // one token, any width
  Array<float> normed;  // the same, after a linear's own norm
  Array<float> query, mixed, scores;
  Array<int8_t> query_code;
  Array<uint16_t> half;
  Array<int8_t> code;  // one token's codes: the smallest step quantises in every thread, and needs no barrier
  Array<int32_t> sums;
  Array<float> floats;  // one token's dense inputs
  float scale[kInputs] = {};
  std::optional<Lookup> lookup;  // where activations have four bits and the room looks them up
};

// Tapped values of a forward pass, by name.
struct Tap {
  std::vector<size_t> shape;
  std::vector<int8_t> codes;
  std::vector<float> floats;
};
using Taps = std::map<std::string, Tap>;

struct Workspace {
  Workspace(const Config& config, const KernelTable& room, size_t threads);
  uint64_t bytes() const;

  size_t widest;        // features of the widest state
  size_t widest_codes;  // bytes of the widest code row
  size_t most_segments;
  size_t state_stride, query_stride, key_stride, hidden_stride;

  Array<float> state;          // [tokens][state_stride]: the residual stream
  Array<float> addend;         // the same: what is normed before it is added to the state, where a family does so
  Array<float> qkv;            // [tokens][query_stride + 2 * key_stride]
  Array<float> attended;       // [tokens][query_stride]
  Array<float> hidden;         // [tokens][hidden_stride]: activation(gate) * up
  Array<float> cosine, sine;   // [ropes][tokens][head_dim / 2]
  Array<int8_t> code, packed;  // [kInputs][tokens][widest_codes]
  Array<int32_t> sums;
  Array<float> scale;
  Array<float> floats;           // [kInputs][tokens][widest], for dense linears
  std::vector<Scratch> scratch;  // one per thread
  std::vector<Range> tiles;      // of attention: tokens of one sequence, at most kAttendRows query rows a KV head
  bool one_token_each = false;   // of every sequence in the chunk
  bool shares_bytes = false;     // a cache of the chunk does
  Taps* taps = nullptr;
  Profile* profile = nullptr;

  const float* state_of(size_t token) const { return state.data() + token * state_stride; }
  void end(Phase phase, const Worker& worker) const {
    if (profile != nullptr && worker.index() == 0) profile->end(phase);
  }
};

}  // namespace bitdistill
