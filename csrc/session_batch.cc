// Several sequences together: their tokens share every pass over the weights, and only attention tells them apart.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "session.h"

namespace bitdistill {
namespace {

// All sessions at once, always in the order of their addresses, so that two calls never wait for each other.
std::vector<std::unique_lock<std::mutex>> lock_all(std::vector<std::mutex*> mutexes) {
  std::sort(mutexes.begin(), mutexes.end(), std::less<>());
  if (std::adjacent_find(mutexes.begin(), mutexes.end()) != mutexes.end()) {
    throw std::invalid_argument("a session is there twice: each sequence needs its own");
  }
  std::vector<std::unique_lock<std::mutex>> locks;
  for (std::mutex* mutex : mutexes) locks.emplace_back(*mutex);
  return locks;
}

}  // namespace

std::vector<std::unique_lock<std::mutex>> Session::lock_together(std::span<Session* const> sessions) {
  if (sessions.empty()) throw std::invalid_argument("no sessions: give at least one");
  std::vector<std::mutex*> mutexes;
  for (Session* session : sessions) {
    if (session->model_ != sessions[0]->model_) {
      throw std::invalid_argument("the sessions belong to different models");
    }
    mutexes.push_back(&session->mutex_);
  }
  return lock_all(std::move(mutexes));
}

void Session::feed_together(std::span<Session* const> sessions, std::span<const std::span<const int32_t>> tokens,
                            float* logits) {
  const size_t width = model_->config().hidden_size, vocabulary = model_->config().vocab_size;
  std::vector<float> last(sessions.size() * work_.state_stride);  // the states that logits are made of
  std::vector<size_t> whose;                                      // rows of the chunk that end a sequence, and which
  const auto run = [&] {
    run_chunk(rows_, [](Worker&) {});
    for (size_t t = 0; t < rows_.size(); ++t) {
      if (whose[t] == sessions.size()) continue;
      std::memcpy(last.data() + whose[t] * work_.state_stride, work_.state_of(t), width * sizeof(float));
    }
    rows_.clear();
    whose.clear();
  };
  rows_.clear();
  for (size_t s = 0; s < sessions.size(); ++s) {
    Session& session = *sessions[s];
    session.has_logits_ = false;
    for (size_t i = 0; i < tokens[s].size(); ++i) {
      rows_.push_back({tokens[s][i], session.stored_ + i, &session.cache_});
      whose.push_back(i + 1 == tokens[s].size() ? s : sessions.size());
      if (rows_.size() == kChunk) run();
    }
  }
  if (!rows_.empty()) run();
  for (size_t s = 0; s < sessions.size(); ++s) sessions[s]->stored_ += tokens[s].size();
  normed_.resize(std::max(normed_.size(), kHeadTokens * width));
  if (profile_) profile_->begin();
  for (size_t first = 0; first < sessions.size(); first += kHeadTokens) {
    const size_t count = std::min(kHeadTokens, sessions.size() - first);
    model_->pool().run([&](Worker& worker) {
      run_head(*model_, last.data() + first * work_.state_stride, count, work_, normed_.data(),
               logits + first * vocabulary, worker);
    });
  }
  if (profile_) profile_->end(Phase::head);
}

void Session::forward_together(std::span<Session* const> sessions, std::span<const std::span<const int32_t>> tokens,
                               float* logits) {
  if (sessions.size() != tokens.size()) throw std::invalid_argument("give tokens for each session");
  const auto locks = lock_together(sessions);
  for (size_t s = 0; s < sessions.size(); ++s) sessions[s]->check(tokens[s]);
  for (Session* session : sessions) session->feed_pending();
  sessions[0]->feed_together(sessions, tokens, logits);
  const size_t vocabulary = sessions[0]->logits_.size();
  for (size_t s = 0; s < sessions.size(); ++s) {
    std::memcpy(sessions[s]->logits_.data(), logits + s * vocabulary, vocabulary * sizeof(float));
    sessions[s]->has_logits_ = true;
  }
}

std::vector<Finish> Session::decode_together(std::span<Session* const> sessions, std::span<Sampler* const> samplers,
                                             size_t max_new_tokens, std::span<const int32_t> stop,
                                             std::vector<std::vector<int32_t>>& out) {
  if (sessions.size() != samplers.size()) throw std::invalid_argument("give a sampler for each session");
  const auto locks = lock_together(sessions);
  for (const Session* session : sessions) {
    if (!session->pending_ && !session->has_logits_) {
      throw std::invalid_argument("nothing to continue: call forward with the prompt first");
    }
  }
  std::vector<Finish> finish(sessions.size(), Finish::length);
  out.assign(sessions.size(), {});
  std::vector<size_t> active(sessions.size());  // those that still write
  for (size_t s = 0; s < active.size(); ++s) active[s] = s;
  const size_t vocabulary = sessions[0]->logits_.size();
  std::vector<float>& logits = sessions[0]->together_;
  logits.resize(std::max(logits.size(), sessions.size() * vocabulary));
  for (size_t i = 0; i < max_new_tokens && !active.empty(); ++i) {
    std::erase_if(active, [&](size_t s) {
      if (sessions[s]->position() < sessions[s]->context_) return false;
      finish[s] = Finish::context;
      return true;
    });
    std::vector<Session*> fed;
    std::vector<int32_t> token;
    for (const size_t s : active) {
      if (!sessions[s]->pending_) continue;
      fed.push_back(sessions[s]);
      token.push_back(*sessions[s]->pending_);
      sessions[s]->pending_.reset();
    }
    std::vector<std::span<const int32_t>> tokens;
    for (const int32_t& one : token) tokens.emplace_back(&one, 1);
    if (!fed.empty()) fed[0]->feed_together(fed, tokens, logits.data());
    const float* next = logits.data();
    std::erase_if(active, [&](size_t s) {
      Session& session = *sessions[s];
      const float* own = session.logits_.data();
      if (!session.has_logits_) own = std::exchange(next, next + vocabulary);  // fed just now
      const int32_t one = samplers[s]->sample(own, vocabulary);
      if (std::find(stop.begin(), stop.end(), one) != stop.end()) {
        if (!session.has_logits_) std::memcpy(session.logits_.data(), own, vocabulary * sizeof(float));
        session.has_logits_ = true;
        finish[s] = Finish::stop;
        return true;
      }
      out[s].push_back(one);
      session.pending_ = one;
      session.has_logits_ = false;
      return false;
    });
  }
  for (const size_t s : active) {
    if (sessions[s]->position() >= sessions[s]->context_) finish[s] = Finish::context;
  }
  return finish;
}

}  // namespace bitdistill
