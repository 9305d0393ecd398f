// One sequence of tokens on a model.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>

#include "decoder.h"
#include "sampler.h"
#include "screen.h"

namespace bitdistill {

// Tokens whose logits are computed together: their states fit the second-level cache beside a strip of the head.
constexpr size_t kHeadTokens = 16;

enum class Finish { stop, length, context };

class Session {
 public:
  // context 0: the model's. Throws std::invalid_argument.
  Session(std::shared_ptr<const Model> model, size_t context, Cache kv);

  const Model& model() const { return *model_; }
  size_t position() const { return stored_ + (pending_ ? 1 : 0); }
  size_t context() const { return context_; }
  uint64_t cache_bytes() const { return cache_.bytes(stored_); }
  uint64_t scratch_bytes() const { return work_.bytes(); }

  // Appends tokens; logits of the last one into [V], or of each into [n][V]. Throws std::invalid_argument, unchanged.
  void forward(std::span<const int32_t> tokens, bool all_positions, float* logits, Taps* taps = nullptr);
  // log p(tokens[i]) for i in [first, n).
  void score(std::span<const int32_t> tokens, size_t first, float* out);
  Finish decode(Sampler& sampler, size_t max_new_tokens, std::span<const int32_t> stop, std::vector<int32_t>& out);
  void truncate(size_t position);

  // Several sequences of one model together, each as if alone; no session may come twice. Throws std::invalid_argument,
  // all unchanged.
  // logits[s][V] of the last of tokens[s], appended to sessions[s].
  static void forward_together(std::span<Session* const> sessions, std::span<const std::span<const int32_t>> tokens,
                               float* logits);
  static std::vector<Finish> decode_together(std::span<Session* const> sessions, std::span<Sampler* const> samplers,
                                             size_t max_new_tokens, std::span<const int32_t> stop,
                                             std::vector<std::vector<int32_t>>& out);

  // Counts the time of each phase from here on; what was counted before is forgotten.
  void start_profile();
  const std::optional<Profile>& profile() const { return profile_; }
  // Of screened decoding: rows of the head that were scored in full, a token.
  double rescored_rows() const {
    return screen_ && screen_->tokens != 0 ? static_cast<double>(screen_->rescored) / screen_->tokens : 0;
  }

 private:
  void check(std::span<const int32_t> tokens) const;
  // Held for as long as the sessions are worked on together. Throws std::invalid_argument.
  static std::vector<std::unique_lock<std::mutex>> lock_together(std::span<Session* const> sessions);
  // All chunks of `tokens` through the layers; after_chunk(worker, done, count) runs on every thread after each.
  template <class AfterChunk>
  void feed(std::span<const int32_t> tokens, AfterChunk&& after_chunk);
  void run_chunk(Chunk chunk, const std::function<void(Worker&)>& after);
  void feed_for_last(std::span<const int32_t> tokens);
  void feed_pending();
  // Feeds what is pending and takes the likeliest token; the logits stay uncomputed where a screen decides.
  int32_t next_greedy();
  // logits_ of the token fed last, whose state is still in the buffers.
  void complete_logits();
  // Tokens of several sessions, in the buffers of this one; logits[s][V] of the last token of each.
  void feed_together(std::span<Session* const> sessions, std::span<const std::span<const int32_t>> tokens,
                     float* logits);

  std::shared_ptr<const Model> model_;
  size_t context_;
  KvCache cache_;
  Workspace work_;
  std::optional<Profile> profile_;
  std::optional<Screen::Pass> screen_;
  std::mutex mutex_;  // a second thread's call waits
  size_t stored_ = 0;
  std::optional<int32_t> pending_;  // generated, not yet fed
  bool has_logits_ = false;         // logits_ follow the last token
  std::vector<float> logits_;
  std::vector<float> normed_;  // [kChunk][hidden_size] at most
  std::vector<Row> rows_;
  std::vector<float> together_;  // logits of a batch that this session leads
};

}  // namespace bitdistill
