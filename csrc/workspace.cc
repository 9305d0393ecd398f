#include "workspace.h"

namespace bitdistill {

Workspace::Workspace(const Config& c, const KernelTable& room, size_t threads)
    : widest(std::max({c.hidden_size, c.query_size(), c.intermediate_size})),
      state_stride(round_up(c.hidden_size, kRowBlock)),
      query_stride(round_up(c.query_size(), kRowBlock)),
      key_stride(round_up(c.key_size(), kRowBlock)),
      hidden_stride(round_up(c.intermediate_size, kRowBlock)) {
  widest_codes = most_segments = 0;
  for (const size_t columns : {c.hidden_size, c.query_size(), c.intermediate_size}) {
    const CodeShape shape = code_shape(columns, c.block_size, room.group);
    widest_codes = std::max(widest_codes, round_up(shape.stride(), kAlignment));
    most_segments = std::max(most_segments, shape.segments);
  }
  state = Array<float>(kChunk * state_stride);
  addend = Array<float>(kChunk * state_stride);
  qkv = Array<float>(kChunk * (query_stride + 2 * key_stride));
  attended = Array<float>(kChunk * query_stride);
  hidden = Array<float>(kChunk * hidden_stride);
  cosine = Array<float>(c.ropes.size() * kChunk * c.head_dim / 2);
  sine = Array<float>(c.ropes.size() * kChunk * c.head_dim / 2);
  code = Array<int8_t>(kInputs * kChunk * widest_codes);
  packed = Array<int8_t>(kInputs * kChunk * widest_codes);
  sums = Array<int32_t>(kInputs * kChunk * most_segments);
  scale = Array<float>(kInputs * kChunk);
  floats = Array<float>(kInputs * kChunk * widest);
  const size_t dim = c.padded_head_dim();
  for (size_t i = 0; i < threads; ++i) {
    Scratch& s = scratch.emplace_back();
    s.state = Array<float>(widest);
    s.normed = Array<float>(widest);
    s.query = Array<float>(kAttendRows * dim);
    s.mixed = Array<float>(kAttendRows * dim);
    s.scores = Array<float>(kAttendRows * kChunkKeys);
    s.query_code = Array<int8_t>(kAttendRows * 2 * dim);
    s.half = Array<uint16_t>(dim);
    s.code = Array<int8_t>(kInputs * widest_codes);
    s.sums = Array<int32_t>(kInputs * most_segments);
    s.floats = Array<float>(kInputs * widest);
    if (c.activation_bits == 4 && room.gemm_int4 != nullptr) s.lookup.emplace();
  }
}

uint64_t Workspace::bytes() const {
  uint64_t total = state.bytes() + addend.bytes() + qkv.bytes() + attended.bytes() + hidden.bytes() + cosine.bytes() +
                   sine.bytes() + code.bytes() + packed.bytes() + sums.bytes() + scale.bytes() + floats.bytes();
  for (const Scratch& s : scratch) {
    total += s.state.bytes() + s.normed.bytes() + s.query.bytes() + s.mixed.bytes() + s.scores.bytes() +
             (s.lookup ? s.lookup->scratch.bytes() + s.lookup->dot.bytes() : 0) + s.query_code.bytes() +
             s.half.bytes() + s.code.bytes() + s.sums.bytes() + s.floats.bytes();
  }
  return total;
}

}  // namespace bitdistill
