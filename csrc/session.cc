#include "session.h"

#include <cmath>
#include <cstring>
#include <stdexcept>

namespace bitdistill {
namespace {

size_t checked_context(const Model& model, size_t context) {
  const size_t most = model.config().max_context;
  if (context > most) {
    throw std::invalid_argument("context = " + std::to_string(context) + " is above the model's limit of " +
                                std::to_string(most));
  }
  return context == 0 ? most : context;
}

float log_probability(const float* logits, size_t count, int32_t token) {
  float peak = logits[0];
  for (size_t i = 1; i < count; ++i) peak = std::max(peak, logits[i]);
  double total = 0;
  for (size_t i = 0; i < count; ++i) total += std::exp(logits[i] - peak);
  return static_cast<float>(static_cast<double>(logits[token]) - peak - std::log(total));
}

}  // namespace

Session::Session(std::shared_ptr<const Model> model, size_t context, Cache kv)
    : model_(std::move(model)),
      context_(checked_context(*model_, context)),
      cache_(model_->config(), context_, kv),
      work_(model_->config(), model_->room(), model_->pool().size()),
      logits_(model_->config().vocab_size) {
  if (model_->screen() != nullptr) screen_.emplace(logits_.size(), model_->pool().size());
}

void Session::check(std::span<const int32_t> tokens) const {
  if (tokens.empty()) throw std::invalid_argument("no tokens: a text needs at least one");
  const auto vocabulary = static_cast<int64_t>(model_->config().vocab_size);
  for (const int32_t token : tokens) {
    if (token < 0 || token >= vocabulary) {
      throw std::invalid_argument("token " + std::to_string(token) + " is outside the vocabulary of " +
                                  std::to_string(vocabulary));
    }
  }
  if (tokens.size() > context_ - position()) {
    throw std::invalid_argument(std::to_string(tokens.size()) + " tokens after " + std::to_string(position()) +
                                " exceed the context of " + std::to_string(context_));
  }
}

void Session::run_chunk(Chunk chunk, const std::function<void(Worker&)>& after) {
  if (profile_) profile_->begin();
  begin_chunk(model_->config(), chunk, work_);
  model_->pool().run([&](Worker& worker) {
    run_layers(*model_, chunk, work_, worker);
    after(worker);
  });
  if (profile_) profile_->end(Phase::head);
}

template <class AfterChunk>
void Session::feed(std::span<const int32_t> tokens, AfterChunk&& after_chunk) {
  for (size_t done = 0; done < tokens.size();) {
    const size_t count = std::min(kChunk, tokens.size() - done);
    rows_.clear();
    for (size_t t = 0; t < count; ++t) rows_.push_back({tokens[done + t], stored_ + t, &cache_});
    run_chunk(rows_, [&](Worker& worker) { after_chunk(worker, done, count); });
    stored_ += count;
    done += count;
  }
}

void Session::feed_for_last(std::span<const int32_t> tokens) {
  has_logits_ = false;
  normed_.resize(std::max(normed_.size(), model_->config().hidden_size));
  feed(tokens, [&](Worker& worker, size_t done, size_t count) {
    if (done + count < tokens.size()) return;
    run_head(*model_, work_.state_of(count - 1), 1, work_, normed_.data(), logits_.data(), worker);
  });
  has_logits_ = true;
}

void Session::feed_pending() {
  if (!pending_) return;
  const int32_t token = *pending_;
  pending_.reset();
  feed_for_last({&token, 1});
}

int32_t Session::next_greedy() {
  const int32_t fed = *pending_;
  pending_.reset();
  const Config& config = model_->config();
  normed_.resize(std::max(normed_.size(), config.hidden_size));
  int32_t token = -1;
  feed({&fed, 1}, [&](Worker& worker, size_t, size_t) {
    if (worker.index() == 0) {
      model_->room().rms_norm(work_.state_of(0), model_->final_norm(), config.rms_norm_eps, config.hidden_size,
                              normed_.data());
    }
    const int32_t found = model_->screen()->best(normed_.data(), *screen_, worker);
    if (worker.index() == 0) token = found;
  });
  if (token < 0) complete_logits();
  return token;
}

void Session::complete_logits() {
  model_->pool().run(
      [&](Worker& worker) { run_head(*model_, work_.state_of(0), 1, work_, normed_.data(), logits_.data(), worker); });
  has_logits_ = true;
}

void Session::forward(std::span<const int32_t> tokens, bool all_positions, float* logits, Taps* taps) {
  const std::lock_guard lock(mutex_);
  check(tokens);
  const size_t vocabulary = logits_.size(), width = model_->config().hidden_size;
  feed_pending();
  if (!all_positions) {
    feed_for_last(tokens);
    std::memcpy(logits, logits_.data(), vocabulary * sizeof(float));
    return;
  }
  has_logits_ = false;
  normed_.resize(kChunk * width);
  work_.taps = taps;
  feed(tokens, [&](Worker& worker, size_t done, size_t count) {
    for (size_t first = 0; first < count; first += kHeadTokens) {
      run_head(*model_, work_.state_of(first), std::min(kHeadTokens, count - first), work_,
               normed_.data() + first * width, logits + (done + first) * vocabulary, worker);
    }
  });
  work_.taps = nullptr;
  std::memcpy(logits_.data(), logits + (tokens.size() - 1) * vocabulary, vocabulary * sizeof(float));
  has_logits_ = true;
}

void Session::score(std::span<const int32_t> tokens, size_t first, float* out) {
  const std::lock_guard lock(mutex_);
  check(tokens);
  if (first > tokens.size()) {
    throw std::invalid_argument("first = " + std::to_string(first) + " is beyond the " + std::to_string(tokens.size()) +
                                " tokens");
  }
  const size_t vocabulary = logits_.size(), width = model_->config().hidden_size;
  feed_pending();
  if (first == 0) {
    if (!has_logits_)
      throw std::invalid_argument("first = 0: nothing comes before the first token of an empty session");
    *out++ = log_probability(logits_.data(), vocabulary, tokens[0]);
    first = 1;
  }
  has_logits_ = false;
  normed_.resize(kChunk * width);
  std::vector<float> logits(kHeadTokens * vocabulary);
  const size_t last = tokens.size() - 1;
  feed(tokens, [&](Worker& worker, size_t done, size_t count) {
    // Position i predicts token i + 1; the last position's logits are kept for what follows.
    for (size_t at = 0; at < count; at += kHeadTokens) {
      const size_t part = std::min(kHeadTokens, count - at);
      if (done + at + part < first) continue;
      run_head(*model_, work_.state_of(at), part, work_, normed_.data() + at * width, logits.data(), worker);
      worker.barrier();
      const Range mine = worker.share(part);
      for (size_t t = mine.begin; t < mine.end; ++t) {
        const size_t position = done + at + t;
        const float* row = logits.data() + t * vocabulary;
        if (position == last) std::memcpy(logits_.data(), row, vocabulary * sizeof(float));
        if (position + 1 >= first && position < last) {
          out[position + 1 - first] = log_probability(row, vocabulary, tokens[position + 1]);
        }
      }
      worker.barrier();
    }
  });
  has_logits_ = true;
}

Finish Session::decode(Sampler& sampler, size_t max_new_tokens, std::span<const int32_t> stop,
                       std::vector<int32_t>& out) {
  const std::lock_guard lock(mutex_);
  if (!pending_ && !has_logits_) throw std::invalid_argument("nothing to continue: call forward with the prompt first");
  for (size_t i = 0; i < max_new_tokens; ++i) {
    if (position() >= context_) return Finish::context;
    int32_t token = -1;
    if (pending_ && screen_ && sampler.is_greedy()) token = next_greedy();
    if (token < 0) {
      feed_pending();
      token = sampler.sample(logits_.data(), logits_.size());
    }
    if (std::find(stop.begin(), stop.end(), token) != stop.end()) {
      if (!has_logits_) complete_logits();
      return Finish::stop;
    }
    out.push_back(token);
    pending_ = token;
    has_logits_ = false;
  }
  return position() >= context_ ? Finish::context : Finish::length;
}

void Session::start_profile() {
  const std::lock_guard lock(mutex_);
  profile_.emplace();
  work_.profile = &*profile_;
}

void Session::truncate(size_t position) {
  const std::lock_guard lock(mutex_);
  if (position > this->position()) {
    throw std::invalid_argument("position = " + std::to_string(position) + " is beyond the text of " +
                                std::to_string(this->position()) + " tokens");
  }
  if (position == this->position()) return;
  pending_.reset();
  has_logits_ = false;
  stored_ = std::min(stored_, position);
}

}  // namespace bitdistill
