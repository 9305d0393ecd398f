// Classification: logits of a few tokens after each of several texts, and nothing else.
//
// All texts go through a layer before the next begins, so that one layer's keys and values are held at a time; of the
// last layer every token but a text's last contributes only those. The logits are a session's, to the bit.
#pragma once

#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "decoder.h"

namespace bitdistill {

class LabelHead {
 public:
  // Throws std::invalid_argument: no labels, or one outside the vocabulary.
  LabelHead(std::shared_ptr<const Model> model, std::vector<int32_t> labels, Cache kv);

  size_t labels() const { return labels_.size(); }
  // logits[text][label]. Throws std::invalid_argument: an empty text, one that exceeds the context or the vocabulary.
  void logits(std::span<const std::span<const int32_t>> texts, float* logits);

 private:
  void check(std::span<const int32_t> text) const;
  void read_group(std::span<const std::span<const int32_t>> texts, float* logits);
  void run_chunks(std::span<const Row> rows);
  void run_last(std::span<const Row> last, float* logits);

  std::shared_ptr<const Model> model_;
  std::vector<int32_t> labels_;
  Cache form_;
  Workspace work_;
  std::deque<KvCache> caches_;  // of one layer and kChunk tokens, one for each text of a group
  std::vector<float> states_;   // [tokens of a group][work_.state_stride]
  std::vector<float> last_, normed_;
  std::mutex mutex_;
};

}  // namespace bitdistill
