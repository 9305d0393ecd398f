#include <cstring>

#include "decoder.h"
#include "low_bits.h"

namespace bitdistill {
namespace {

// x as pairs (x[i], x[i + half]), rotated: Hugging Face's rotate_half.
void rotate(float* x, const float* cosine, const float* sine, size_t half) {
  for (size_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cosine[i] - b * sine[i];
    x[i + half] = b * cosine[i] + a * sine[i];
  }
}

class AttentionPass {
 public:
  AttentionPass(const Model& model, size_t layer, Chunk chunk, Workspace& work, Worker& worker)
      : config_(model.config()),
        room_(model.room()),
        layer_(model.layers()[layer]),
        kind_(config_.attention[layer]),
        index_(layer),
        chunk_(chunk),
        work_(work),
        own_(work.scratch[worker.index()]),
        row_stride_(work.query_stride + 2 * work.key_stride) {}

  // Rotates the queries that read KV head `head`, and stores its key and value.
  void turn_and_store(size_t t, size_t head) {
    const size_t dim = config_.head_dim, group = config_.queries_per_key();
    for (size_t i = 0; i < group; ++i) {
      float* query = query_row(t) + (head * group + i) * dim;
      if (layer_.q_norm != nullptr) room_.rms_norm(query, layer_.q_norm, config_.rms_norm_eps, dim, query);
      turn(query, t);
      if (config_.query_bits < 16) round_to(config_.query_bits, query);
    }
    store(t, head);
  }

  void store(size_t t, size_t head) {
    const size_t dim = config_.head_dim;
    float* key = query_row(t) + work_.query_stride + head * dim;
    if (layer_.k_norm != nullptr) room_.rms_norm(key, layer_.k_norm, config_.rms_norm_eps, dim, key);
    turn(key, t);
    float* value = query_row(t) + work_.query_stride + work_.key_stride + head * dim;
    if (config_.kv_bits < 16 && config_.kv_bits < chunk_[t].cache->bits()) {  // else the cache rounds them
      const size_t bits = chunk_[t].position == 0 ? 8 : config_.kv_bits;
      round_to(bits, key);
      round_to(bits, value);
    }
    chunk_[t].cache->store(room_, index_, head, chunk_[t].position, key, value, own_.half.data());
  }

  // Query heads [first_query, first_query + queries) of KV head `head` for a tile of tokens of one sequence.
  void attend(size_t head, size_t first_query, size_t queries, Range tile) {
    const size_t first = tile.begin, tokens = tile.end - tile.begin;
    const size_t dim = config_.head_dim, padded = config_.padded_head_dim();
    size_t seen_from[kAttendRows], visible[kAttendRows];
    for (size_t t = 0; t < tokens; ++t) {
      for (size_t i = 0; i < queries; ++i) {
        const float* from = query_row(first + t) + (first_query + i) * dim;
        float* to = own_.query.data() + (t * queries + i) * padded;
        for (size_t e = 0; e < dim; ++e) to[e] = from[e] * config_.attention_scale;
        const size_t end = chunk_[first + t].position + 1;
        visible[t * queries + i] = end;
        seen_from[t * queries + i] = kind_.window == 0 || kind_.window >= end ? 0 : end - kind_.window;
      }
    }
    Attend args{
        .query = own_.query.data(),
        .rows = tokens * queries,
        .first = seen_from,
        .visible = visible,
        .head_dim = dim,
        .padded_dim = padded,
        .out = own_.mixed.data(),
        .scores = own_.scores.data(),
        .query_code = own_.query_code.data(),
    };
    chunk_[first].cache->show(index_, head, args);
    room_.attend(&args);
    for (size_t t = 0; t < tokens; ++t) {
      for (size_t i = 0; i < queries; ++i) {
        std::memcpy(work_.attended.data() + (first + t) * work_.query_stride + (first_query + i) * dim,
                    own_.mixed.data() + (t * queries + i) * padded, dim * sizeof(float));
      }
    }
  }

 private:
  float* query_row(size_t t) { return work_.qkv.data() + t * row_stride_; }

  void round_to(size_t bits, float* x) {
    const LowBits low(x, config_.head_dim, bits);
    for (size_t e = 0; e < config_.head_dim; ++e) x[e] = low.value(x[e]);
  }

  void turn(float* x, size_t t) {
    if (kind_.rope == LayerAttention::kNoRope) return;
    const size_t half = config_.head_dim / 2, at = (kind_.rope * kChunk + t) * half;
    rotate(x, work_.cosine.data() + at, work_.sine.data() + at, half);
  }

  const Config& config_;
  const KernelTable& room_;
  const Layer& layer_;
  const LayerAttention kind_;
  size_t index_;
  const Chunk chunk_;
  Workspace& work_;
  Scratch& own_;
  size_t row_stride_;
};

// body(t, head) for every token and KV head, dealt by tokens; by heads where positions share bytes of a cache.
template <class Body>
void deal_states(Chunk chunk, size_t heads, const Workspace& work, Worker& worker, Body&& body) {
  const size_t count = chunk.size();
  const auto all = [&](Range tokens, Range of_heads) {
    for (size_t t = tokens.begin; t < tokens.end; ++t) {
      for (size_t head = of_heads.begin; head < of_heads.end; ++head) body(t, head);
    }
  };
  if (work.shares_bytes) {
    worker.deal(heads, 1, [&](Range part) { all({0, count}, part); });
  } else {
    worker.deal(count, kTokensDealt, [&](Range part) { all(part, {0, heads}); });
  }
}

}  // namespace

void run_attention(const Model& model, size_t layer, Chunk chunk, Workspace& work, Worker& worker) {
  const Config& config = model.config();
  const size_t heads = config.num_key_value_heads, group = config.queries_per_key();
  const size_t queries = std::min(group, kAttendRows);  // of one call
  AttentionPass pass(model, layer, chunk, work, worker);
  const auto attend = [&](size_t head, Range tile) {
    for (size_t q = 0; q < group; q += queries) {
      pass.attend(head, head * group + q, std::min(queries, group - q), tile);
    }
  };
  // Where each sequence has one token a head stays with one thread from projection to output: no barrier between
  // storing and reading.
  const bool one_each = work.one_token_each;
  if (!one_each) {
    deal_states(chunk, heads, work, worker, [&](size_t t, size_t head) { pass.turn_and_store(t, head); });
    worker.barrier();
  }
  const size_t tiles = work.tiles.size();
  worker.deal(heads * tiles, 1, [&](Range one) {
    const size_t head = one.begin / tiles;
    const Range tile = work.tiles[one.begin % tiles];
    if (one_each) pass.turn_and_store(tile.begin, head);
    attend(head, tile);
  });
}

void store_keys(const Model& model, size_t layer, Chunk chunk, Workspace& work, Worker& worker) {
  AttentionPass pass(model, layer, chunk, work, worker);
  deal_states(chunk, model.config().num_key_value_heads, work, worker,
              [&](size_t t, size_t head) { pass.store(t, head); });
}

}  // namespace bitdistill
