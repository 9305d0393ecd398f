#include "label_head.h"

#include <cstring>
#include <optional>
#include <stdexcept>

namespace bitdistill {
namespace {

// The rows of a head around one token: the row itself, or the block of rows it is interleaved with.
DenseMatrix rows_around(const DenseMatrix& head, size_t token) {
  DenseMatrix rows = head;
  rows.rows = head.form == Form::int4 ? kInt4Rows : 1;
  const size_t first = token / rows.rows * rows.rows;
  rows.data += first * head.row_bytes();
  if (head.scale != nullptr) rows.scale += first;
  if (head.group_scale != nullptr) rows.group_scale += first * head.scale_bytes();
  return rows;
}

}  // namespace

LabelHead::LabelHead(std::shared_ptr<const Model> model, std::vector<int32_t> labels, Cache kv)
    : model_(std::move(model)),
      labels_(std::move(labels)),
      form_(kv),
      work_(model_->config(), model_->room(), model_->pool().size()) {
  if (labels_.empty()) throw std::invalid_argument("no labels: give at least one token");
  for (const int32_t label : labels_) check({&label, 1});
}

void LabelHead::check(std::span<const int32_t> text) const {
  const Config& config = model_->config();
  if (text.empty()) throw std::invalid_argument("no tokens: a text needs at least one");
  if (text.size() > config.max_context) {
    throw std::invalid_argument(std::to_string(text.size()) + " tokens exceed the context of " +
                                std::to_string(config.max_context));
  }
  for (const int32_t token : text) {
    if (token < 0 || static_cast<size_t>(token) >= config.vocab_size) {
      throw std::invalid_argument("token " + std::to_string(token) + " is outside the vocabulary of " +
                                  std::to_string(config.vocab_size));
    }
  }
}

void LabelHead::logits(std::span<const std::span<const int32_t>> texts, float* logits) {
  const std::lock_guard lock(mutex_);
  for (const auto& text : texts) check(text);
  // Short texts share a chunk; a text longer than that goes by itself.
  for (size_t begin = 0, end; begin < texts.size(); begin = end) {
    size_t tokens = texts[begin].size();
    for (end = begin + 1; end < texts.size() && tokens + texts[end].size() <= kChunk; ++end) {
      tokens += texts[end].size();
    }
    read_group(texts.subspan(begin, end - begin), logits + begin * labels_.size());
  }
}

void LabelHead::read_group(std::span<const std::span<const int32_t>> texts, float* logits) {
  const Config& config = model_->config();
  std::optional<KvCache> one_long;
  if (texts[0].size() > kChunk) one_long.emplace(config, texts[0].size(), form_, 1);
  while (!one_long && caches_.size() < texts.size()) caches_.emplace_back(config, kChunk, form_, 1);
  std::vector<Row> rows, last;
  for (size_t i = 0; i < texts.size(); ++i) {
    KvCache* cache = one_long ? &*one_long : &caches_[i];
    for (size_t t = 0; t < texts[i].size(); ++t) rows.push_back({texts[i][t], t, cache});
    last.push_back(rows.back());
  }
  states_.resize(std::max(states_.size(), rows.size() * work_.state_stride));
  run_chunks(rows);
  last_.resize(std::max(last_.size(), last.size() * work_.state_stride));
  for (size_t i = 0, end = 0; i < texts.size(); ++i) {
    end += texts[i].size();
    std::memcpy(last_.data() + i * work_.state_stride, states_.data() + (end - 1) * work_.state_stride,
                config.hidden_size * sizeof(float));
  }
  run_last(last, logits);
}

// All layers but the last, and of that the keys and values.
void LabelHead::run_chunks(std::span<const Row> rows) {
  const size_t layers = model_->layers().size();
  for (size_t layer = 0; layer < layers; ++layer) {
    for (size_t begin = 0; begin < rows.size(); begin += kChunk) {
      const Chunk chunk = rows.subspan(begin, std::min(kChunk, rows.size() - begin));
      if (layer == 0 || rows.size() > kChunk) begin_chunk(model_->config(), chunk, work_);
      float* state = states_.data() + begin * work_.state_stride;
      model_->pool().run([&](Worker& worker) {
        if (layer == 0) embed(*model_, chunk, state, work_, worker);
        const auto run = layer + 1 < layers ? run_layer : store_layer;
        run(*model_, layer, chunk, state, work_, worker);
      });
    }
  }
}

void LabelHead::run_last(std::span<const Row> last, float* logits) {
  const Config& config = model_->config();
  const size_t width = config.hidden_size, count = last.size();
  normed_.resize(std::max(normed_.size(), count * width));
  begin_chunk(config, last, work_);
  model_->pool().run([&](Worker& worker) {
    run_layer(*model_, model_->layers().size() - 1, last, last_.data(), work_, worker);
    const Range mine = worker.share(count);
    for (size_t t = mine.begin; t < mine.end; ++t) {
      model_->room().rms_norm(last_.data() + t * work_.state_stride, model_->final_norm(), config.rms_norm_eps, width,
                              normed_.data() + t * width);
    }
    worker.barrier();
    const HeadInput input(model_->head(), normed_.data(), count);
    worker.deal(labels_.size(), 1, [&](Range one) {
      const auto label = static_cast<size_t>(labels_[one.begin]);
      const DenseMatrix rows = rows_around(model_->head(), label);
      std::vector<float> around(count * rows.rows);
      head_rows(model_->room(), rows, input, {0, rows.rows}, around.data());
      for (size_t t = 0; t < count; ++t) {
        logits[t * labels_.size() + one.begin] = around[t * rows.rows + label % rows.rows];
      }
    });
  });
}

}  // namespace bitdistill
