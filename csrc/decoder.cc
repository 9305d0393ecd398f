#include "decoder.h"

#include <cmath>
#include <cstring>

namespace bitdistill {
namespace {

constexpr size_t kHeadRowsDealt = 512;

class LayerPass {
 public:
  LayerPass(const Model& model, Chunk chunk, Workspace& work, Worker& worker)
      : config_(model.config()), room_(model.room()), chunk_(chunk), work_(work), worker_(worker) {}

  // Inputs of linears that read x = [tokens][x_stride]: normed by `norm` (null: as it is), then by each linear's own
  // norm, then transformed where it asks for that, then quantised or kept as floats. Linears without a norm of their
  // own share one input.
  void prepare(const float* x, size_t x_stride, const float* norm, std::span<const Linear* const> linears) {
    const bool alone = chunk_.size() == 1;
    for (size_t i = 0; i < linears.size(); ++i) {
      inputs_[i] = input_for(*linears[i], alone, i);
      same_as_[i] = i;
      for (size_t j = 0; j < i; ++j) {
        if (!linears[i]->norm && !linears[j]->norm && linears[i]->is_ternary == linears[j]->is_ternary)
          same_as_[i] = same_as_[j];
      }
      inputs_[i] = inputs_[same_as_[i]];
    }
    if (alone) {
      prepare_token(x, 0, norm, linears);
    } else {
      worker_.deal(chunk_.size(), inputs_[0].tile, [&](Range tile) {
        for (size_t t = tile.begin; t < tile.end; ++t) prepare_token(x + t * x_stride, t, norm, linears);
        for (size_t i = 0; i < linears.size(); ++i) {
          if (same_as_[i] != i || !linears[i]->is_ternary) continue;
          if (!is_looked_up(room_, *linears[i], inputs_[i])) pack_tile(tile.begin, inputs_[i]);
        }
      });
      worker_.barrier();
    }
    if (work_.taps != nullptr && worker_.index() == 0) tap(linears);
  }

  const Input& input(size_t i) const { return inputs_[i]; }

 private:
  Input input_for(const Linear& linear, bool alone, size_t slot) {
    Scratch& own = work_.scratch[worker_.index()];
    Input in;
    in.tokens = chunk_.size();
    in.tile = tile_for(chunk_.size(), room_.tile);
    in.columns = linear.columns();
    in.shape = code_shape(in.columns, config_.block_size, room_.group);
    const size_t rows = alone ? 1 : kChunk;
    in.code = (alone ? own.code : work_.code).data() + slot * rows * work_.widest_codes;
    in.packed = work_.packed.data() + slot * rows * work_.widest_codes;
    in.sums = (alone ? own.sums : work_.sums).data() + slot * rows * work_.most_segments;
    in.scale = (alone ? own.scale : work_.scale.data()) + slot * rows;
    in.lookup = own.lookup ? &*own.lookup : nullptr;
    in.floats = (alone ? own.floats : work_.floats).data() + slot * rows * work_.widest;
    return in;
  }

  void prepare_token(const float* x, size_t t, const float* norm, std::span<const Linear* const> linears) {
    Scratch& own = work_.scratch[worker_.index()];
    const size_t n = linears[0]->columns();
    const float* normed = x;
    if (norm != nullptr) {
      room_.rms_norm(x, norm, config_.rms_norm_eps, n, own.state.data());
      normed = own.state.data();
    }
    for (size_t i = 0; i < linears.size(); ++i) {
      if (same_as_[i] != i) continue;
      const float* in = normed;
      if (linears[i]->norm != nullptr) {
        room_.rms_norm(normed, linears[i]->norm, config_.rms_norm_eps, n, own.normed.data());
        in = own.normed.data();
      }
      if (const size_t block = linears[i]->hadamard_block; block != 0) {
        if (in != own.normed.data()) std::memcpy(own.normed.data(), in, n * sizeof(float));
        room_.hadamard(own.normed.data(), n, block);
        in = own.normed.data();
      }
      if (linears[i]->is_ternary) {
        quantize_token(room_, config_, in, t, inputs_[i]);
      } else {
        std::memcpy(inputs_[i].floats + t * n, in, n * sizeof(float));
      }
    }
  }

  void tap(std::span<const Linear* const> linears) {
    for (size_t i = 0; i < linears.size(); ++i) {
      if (!linears[i]->is_ternary) continue;
      const Input& in = inputs_[i];
      Tap& code = (*work_.taps)[linears[i]->name + ".code"];
      Tap& scale = (*work_.taps)[linears[i]->name + ".scale"];
      code.shape = {code.codes.size() / in.columns + in.tokens, in.columns};
      for (size_t t = 0; t < in.tokens; ++t) {
        for (size_t k = 0; k < in.columns; ++k) {
          const size_t at = k / in.shape.segment * in.shape.padded + k % in.shape.segment;
          code.codes.push_back(in.code[t * in.shape.stride() + at]);
        }
        scale.floats.push_back(in.scale[t]);
      }
      scale.shape = {scale.floats.size()};
    }
  }

  const Config& config_;
  const KernelTable& room_;
  Chunk chunk_;
  Workspace& work_;
  Worker& worker_;
  Input inputs_[kInputs];
  size_t same_as_[kInputs] = {};
};

void tap_states(Workspace& work, const std::string& name, const float* rows, size_t count, size_t width,
                size_t stride) {
  Tap& tap = (*work.taps)[name];
  for (size_t t = 0; t < count; ++t) tap.floats.insert(tap.floats.end(), rows + t * stride, rows + t * stride + width);
  tap.shape = {tap.floats.size() / width, width};
}

// Calls body(Piece) until all row blocks of all tokens are taken. Every thread takes several pieces of all tokens, each
// at most what one gemv runs through. Tables are made for every piece: where products are looked up, its rows are as
// many as a table serves, and tokens are divided first.
template <class Body>
void deal_pieces(Worker& worker, size_t blocks, size_t tokens, bool looked_up, Body&& body) {
  const size_t threads = worker.count();
  if (!looked_up) {
    worker.deal(blocks, std::clamp<size_t>(blocks / (4 * threads), 1, kGemvBlocks),
                [&](Range part) { body(Piece{part, {0, tokens}}); });
    return;
  }
  const size_t most = std::max<size_t>(1, tokens / kLeastLookedUp);
  const size_t parts = std::min(round_up(ceil_div(tokens, kLookupTokens), threads), most);
  const size_t rows = std::min(kLookupBlocks, round_up(ceil_div(blocks * parts, threads), 2));
  const auto begin_of = [&](size_t part) { return std::min(tokens, round_up(tokens * part / parts, 2)); };
  worker.deal(ceil_div(blocks, rows) * parts, 1, [&](Range item) {
    const size_t first = item.begin / parts * rows, part = item.begin % parts;
    body(Piece{{first, std::min(blocks, first + rows)}, {begin_of(part), begin_of(part + 1)}});
  });
}

// state += linear(input), or norm(linear(input)) in families that norm what they add. Ends with a barrier.
void add_to_state(const Model& model, const Linear& linear, const float* norm, const Input& input, float* state,
                  Workspace& work, Worker& worker) {
  const size_t blocks = linear.padded_rows() / kRowBlock;
  float* out = norm == nullptr ? state : work.addend.data();
  const bool looked_up = is_looked_up(model.room(), linear, input);
  deal_pieces(worker, blocks, input.tokens, looked_up, [&](Piece piece) {
    linear_rows(model.room(), linear, input, piece, out, work.state_stride, norm == nullptr);
  });
  worker.barrier();
  if (norm == nullptr) return;
  const size_t width = model.config().hidden_size;
  worker.deal(input.tokens, kTokensDealt, [&](Range tokens) {
    for (size_t t = tokens.begin; t < tokens.end; ++t) {
      float* addend = work.addend.data() + t * work.state_stride;
      float* sum = state + t * work.state_stride;
      model.room().rms_norm(addend, norm, model.config().rms_norm_eps, width, addend);
      for (size_t i = 0; i < width; ++i) sum[i] += addend[i];
    }
  });
  worker.barrier();
}

// Queries, keys and values are one matrix to the threads: row blocks of all three are dealt together, or of the last
// two.
void project_qkv(const Model& model, const Layer& layer, const LayerPass& pass, bool queries, Workspace& work,
                 Worker& worker) {
  const Linear* parts[] = {&layer.q_proj, &layer.k_proj, &layer.v_proj};
  const size_t stride = work.query_stride + 2 * work.key_stride, first_part = queries ? 0 : 1;
  const size_t places[] = {0, work.query_stride, work.query_stride + work.key_stride};
  size_t total = 0;
  for (size_t i = first_part; i < 3; ++i) total += parts[i]->padded_rows() / kRowBlock;
  const auto is_up = [&](size_t i) { return is_looked_up(model.room(), *parts[i], pass.input(i)); };
  const bool looked_up = (!queries || is_up(0)) && is_up(1) && is_up(2);
  deal_pieces(worker, total, pass.input(2).tokens, looked_up, [&](Piece piece) {
    size_t before = 0;
    for (size_t i = first_part; i < 3; ++i) {
      const size_t blocks = parts[i]->padded_rows() / kRowBlock;
      const size_t begin = std::clamp(piece.blocks.begin, before, before + blocks) - before;
      const size_t end = std::clamp(piece.blocks.end, before, before + blocks) - before;
      if (begin < end) {
        linear_rows(model.room(), *parts[i], pass.input(i), {{begin, end}, piece.tokens}, work.qkv.data() + places[i],
                    stride, false);
      }
      before += blocks;
    }
  });
  worker.barrier();
  work.end(Phase::qkv, worker);
}

// What attention reads, into work.qkv; without queries where nobody will ask.
void read_state(const Model& model, const Layer& layer, float* state, bool queries, LayerPass& pass, Workspace& work,
                Worker& worker) {
  const Linear* const parts[] = {&layer.q_proj, &layer.k_proj, &layer.v_proj};
  pass.prepare(state, work.state_stride, layer.attention_norm, parts);
  work.end(Phase::norm, worker);
  project_qkv(model, layer, pass, queries, work, worker);
}

}  // namespace

void begin_chunk(const Config& config, Chunk chunk, Workspace& work) {
  const size_t half = config.head_dim / 2;
  for (size_t r = 0; r < config.ropes.size(); ++r) {
    const Rope& rope = config.ropes[r];
    for (size_t t = 0; t < chunk.size(); ++t) {
      const auto position = static_cast<float>(chunk[t].position);
      const size_t at = (r * kChunk + t) * half;
      for (size_t i = 0; i < half; ++i) {
        const float angle = position * rope.inv_freq[i];  // in fp32, as the models are trained
        work.cosine[at + i] = std::cos(angle) * rope.scale;
        work.sine[at + i] = std::sin(angle) * rope.scale;
      }
    }
  }
  const size_t most = std::max<size_t>(1, kAttendRows / std::min(config.queries_per_key(), kAttendRows));
  work.tiles.clear();
  work.one_token_each = true;
  work.shares_bytes = false;
  for (size_t t = 0; t < chunk.size(); ++t) {
    const bool goes_on = t > 0 && chunk[t].cache == chunk[t - 1].cache;
    work.one_token_each = work.one_token_each && !goes_on;
    work.shares_bytes = work.shares_bytes || chunk[t].cache->shares_bytes();
    if (goes_on && t - work.tiles.back().begin < most) {
      work.tiles.back().end = t + 1;
    } else {
      work.tiles.push_back({t, t + 1});
    }
  }
}

void embed(const Model& model, Chunk chunk, float* state, Workspace& work, Worker& worker) {
  const Config& config = model.config();
  worker.deal(chunk.size(), kTokensDealt, [&](Range tokens) {
    for (size_t t = tokens.begin; t < tokens.end; ++t) {
      float* row = state + t * work.state_stride;
      table_row(model.room(), model.embedding(), static_cast<size_t>(chunk[t].token), row);
      if (config.embedding_scale == 1) continue;
      for (size_t i = 0; i < config.hidden_size; ++i) row[i] *= config.embedding_scale;
    }
  });
  worker.barrier();
  work.end(Phase::embed, worker);
}

void run_layer(const Model& model, size_t index, Chunk chunk, float* state, Workspace& work, Worker& worker) {
  const Config& config = model.config();
  const Layer& layer = model.layers()[index];
  LayerPass pass(model, chunk, work, worker);
  read_state(model, layer, state, true, pass, work, worker);
  run_attention(model, index, chunk, work, worker);
  worker.barrier();
  work.end(Phase::attention, worker);
  const Linear* const reads_attended[] = {&layer.o_proj};
  pass.prepare(work.attended.data(), work.query_stride, nullptr, reads_attended);
  work.end(Phase::norm, worker);
  add_to_state(model, layer.o_proj, layer.attention_output_norm, pass.input(0), state, work, worker);
  work.end(Phase::o_proj, worker);
  const Linear* const reads_mlp[] = {&layer.gate_proj, &layer.up_proj};
  pass.prepare(state, work.state_stride, layer.mlp_norm, reads_mlp);
  work.end(Phase::norm, worker);
  const size_t hidden_blocks = ceil_div(config.intermediate_size, kRowBlock);
  const bool looked_up = is_looked_up(model.room(), layer.gate_proj, pass.input(0)) &&
                         is_looked_up(model.room(), layer.up_proj, pass.input(1));
  deal_pieces(worker, hidden_blocks, pass.input(0).tokens, looked_up, [&](Piece piece) {
    gated_rows(model.room(), config.hidden_act, layer.gate_proj, pass.input(0), layer.up_proj, pass.input(1), piece,
               work.hidden.data(), work.hidden_stride);
  });
  worker.barrier();
  work.end(Phase::gate_up, worker);
  const Linear* const reads_hidden[] = {&layer.down_proj};
  pass.prepare(work.hidden.data(), work.hidden_stride, nullptr, reads_hidden);
  work.end(Phase::norm, worker);
  add_to_state(model, layer.down_proj, layer.mlp_output_norm, pass.input(0), state, work, worker);
  work.end(Phase::down_proj, worker);
  if (work.taps != nullptr && worker.index() == 0) {
    tap_states(work, "model.layers." + std::to_string(index), state, chunk.size(), config.hidden_size,
               work.state_stride);
  }
}

void run_layers(const Model& model, Chunk chunk, Workspace& work, Worker& worker) {
  embed(model, chunk, work.state.data(), work, worker);
  for (size_t i = 0; i < model.layers().size(); ++i) run_layer(model, i, chunk, work.state.data(), work, worker);
}

void store_layer(const Model& model, size_t index, Chunk chunk, float* state, Workspace& work, Worker& worker) {
  LayerPass pass(model, chunk, work, worker);
  read_state(model, model.layers()[index], state, false, pass, work, worker);
  store_keys(model, index, chunk, work, worker);
  worker.barrier();
  work.end(Phase::attention, worker);
}

void run_head(const Model& model, const float* states, size_t count, Workspace& work, float* normed, float* logits,
              Worker& worker) {
  const Config& config = model.config();
  const Range tokens = worker.share(count);
  for (size_t t = tokens.begin; t < tokens.end; ++t) {
    model.room().rms_norm(states + t * work.state_stride, model.final_norm(), config.rms_norm_eps, config.hidden_size,
                          normed + t * config.hidden_size);
  }
  worker.barrier();
  if (work.taps != nullptr && worker.index() == 0) {
    tap_states(work, "model.norm", normed, count, config.hidden_size, config.hidden_size);
  }
  const HeadInput input(model.head(), normed, count);
  worker.deal(config.vocab_size, kHeadRowsDealt,
              [&](Range rows) { head_rows(model.room(), model.head(), input, rows, logits); });
}

}  // namespace bitdistill
