#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>

namespace mixtral {
namespace {

// A total order: the result does not depend on the standard library's sort.
bool more_likely(const Candidate& a, const Candidate& b) {
  return a.weight != b.weight ? a.weight > b.weight : a.id < b.id;
}

// The largest logit, first index on ties.
int64_t argmax(const float* logits, int64_t vocab) {
  float highest = -std::numeric_limits<float>::infinity();
  int64_t best = 0;
  for (int64_t i = 0; i < vocab; ++i) {
    if (std::isnan(logits[i]) || logits[i] == std::numeric_limits<float>::infinity()) {
      std::ostringstream message;
      message << "sampling: logits must be finite or -inf, got " << logits[i] << " for token " << i;
      throw std::runtime_error(message.str());
    }
    if (logits[i] > highest) {
      highest = logits[i];
      best = i;
    }
  }
  if (std::isinf(highest)) throw std::runtime_error("sampling: no token is allowed and has a finite logit");
  return best;
}

// The ids of the k largest scores, falling, ties to the smaller id.
std::vector<int64_t> top_ids(const float* scores, int64_t vocab, int64_t k) {
  std::vector<int64_t> ids(static_cast<size_t>(vocab));
  std::iota(ids.begin(), ids.end(), int64_t{0});
  const auto larger = [&](int64_t a, int64_t b) { return scores[a] != scores[b] ? scores[a] > scores[b] : a < b; };
  const auto end = ids.begin() + std::clamp<int64_t>(k, 0, vocab);
  if (end != ids.end()) std::nth_element(ids.begin(), end, ids.end(), larger);
  std::sort(ids.begin(), end, larger);
  ids.erase(end, ids.end());
  return ids;
}

// Makes tokens impossible whose bit in the mask is 0.
void keep_allowed(std::vector<float>& scores, const std::vector<int32_t>& mask) {
  for (size_t id = 0; id < scores.size(); ++id)
    if ((static_cast<uint32_t>(mask.at(id / 32)) >> (id % 32) & 1) == 0)
      scores[id] = -std::numeric_limits<float>::infinity();
}

// Keeps the most likely candidates that together hold `top_p` of the weight, and no more of them than needed. Sorts a
// chunk at a time, because a few candidates are usually enough.
void keep_top_p(std::vector<Candidate>& candidates, double top_p) {
  double total = 0, mass = 0;
  for (const Candidate& candidate : candidates) total += candidate.weight;
  size_t kept = 0, sorted = 0;
  while (kept < candidates.size() && mass < top_p * total) {
    if (kept == sorted) {
      sorted = std::min(candidates.size(), std::max<size_t>(64, 4 * sorted));
      const auto at = [&](size_t i) { return candidates.begin() + static_cast<std::ptrdiff_t>(i); };
      std::partial_sort(at(kept), at(sorted), candidates.end(), more_likely);
    }
    mass += candidates[kept++].weight;
  }
  candidates.resize(kept);
}

// SplitMix64's finaliser (Steele et al. 2014): a bijection whose output bits all depend on all input bits.
uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

uint64_t random_seed() {
  std::random_device device;
  return uint64_t{device()} << 32 | device();
}

template <typename T>
void require(bool ok, const char* field, const char* expected, T actual) {
  if (ok) return;
  std::ostringstream message;
  message << field << " must be " << expected << ", got " << actual;
  throw std::invalid_argument(message.str());
}

}  // namespace

void SamplingParams::validate() const {
  require(max_tokens >= 1, "max_tokens", ">= 1", max_tokens);
  require(std::isfinite(temperature) && temperature >= 0, "temperature", "finite and >= 0", temperature);
  require(top_p > 0 && top_p <= 1, "top_p", "in (0, 1]", top_p);
  require(top_k >= 0, "top_k", ">= 0", top_k);
  require(min_p >= 0 && min_p <= 1, "min_p", "in [0, 1]", min_p);
  require(std::isfinite(repetition_penalty) && repetition_penalty > 0, "repetition_penalty", "finite and > 0",
          repetition_penalty);
  require(logprobs >= 0 && logprobs <= 20, "logprobs", "in [0, 20]", logprobs);
  for (const std::string& text : stop) require(!text.empty(), "stop", "strings that are not empty", "\"\"");
}

TokenLogprob token_logprob(const float* logits, int64_t vocab, int64_t token_id, int64_t top) {
  if (token_id < 0 || token_id >= vocab) {
    throw std::out_of_range("sampling: token_id must be in [0, " + std::to_string(vocab) + "), got " +
                            std::to_string(token_id));
  }
  const double highest = logits[argmax(logits, vocab)];
  double total = 0;
  for (int64_t i = 0; i < vocab; ++i) total += std::exp(logits[i] - highest);
  // The difference first: added to a large logit, the logarithm would be rounded away.
  const auto logprob = [&](int64_t id) { return (logits[id] - highest) - std::log(total); };

  TokenLogprob result{token_id, logprob(token_id), {}};
  for (const int64_t id : top_ids(logits, vocab, top)) result.top.emplace_back(id, logprob(id));
  return result;
}

Sampler::Sampler(SamplingParams params, const std::vector<int64_t>& prompt_ids)
    : params_(std::move(params)), seen_(prompt_ids.begin(), prompt_ids.end()) {
  params_.validate();
  seed_ = mix(params_.seed ? *params_.seed : random_seed());
}

int64_t Sampler::next(const float* logits, int64_t vocab, const std::vector<int32_t>& allowed) {
  std::vector<float> scores(logits, logits + vocab);
  if (params_.repetition_penalty != 1) {
    const auto penalty = static_cast<float>(params_.repetition_penalty);
    for (const int64_t id : seen_) {
      if (id < 0 || id >= vocab) continue;  // e.g. a prompt with ids that the output layer does not have
      float& score = scores[static_cast<size_t>(id)];
      score = score < 0 ? score * penalty : score / penalty;
    }
  }
  if (!allowed.empty()) keep_allowed(scores, allowed);
  int64_t token = argmax(scores.data(), vocab);
  if (params_.temperature > 0) token = draw(candidates(scores, scores[static_cast<size_t>(token)]));
  take(token);
  return token;
}

void Sampler::take(int64_t token) {
  seen_.insert(token);
  ++drawn_;
}

std::vector<Candidate> Sampler::candidates(const std::vector<float>& scores, float highest) const {
  const auto vocab = static_cast<int64_t>(scores.size());
  std::vector<Candidate> candidates;
  const auto add = [&](int64_t id) {
    // The difference first: 0 for the most likely, whatever the temperature.
    const double distance = static_cast<double>(scores[static_cast<size_t>(id)]) - highest;
    candidates.push_back({id, std::exp(distance / params_.temperature)});
  };
  if (params_.top_k > 0 && params_.top_k < vocab) {
    for (const int64_t id : top_ids(scores.data(), vocab, params_.top_k)) add(id);
  } else {
    candidates.reserve(scores.size());
    for (int64_t id = 0; id < vocab; ++id) add(id);
  }
  if (params_.top_p < 1) keep_top_p(candidates, params_.top_p);
  const auto unlikely = [&](const Candidate& candidate) { return candidate.weight < params_.min_p; };
  candidates.erase(std::remove_if(candidates.begin(), candidates.end(), unlikely), candidates.end());
  return candidates;
}

int64_t Sampler::draw(const std::vector<Candidate>& candidates) const {
  double total = 0;
  for (const Candidate& candidate : candidates) total += candidate.weight;
  double left = uniform() * total;
  int64_t token = candidates.front().id;
  for (const Candidate& candidate : candidates) {
    if (candidate.weight == 0) continue;  // rounding must not end on a token of probability 0
    token = candidate.id;
    left -= candidate.weight;
    if (left < 0) break;
  }
  return token;
}

double Sampler::uniform() const {
  constexpr uint64_t kGoldenRatio = 0x9E3779B97F4A7C15u;
  return static_cast<double>(mix(seed_ + kGoldenRatio * (drawn_ + 1)) >> 11) * 0x1p-53;
}

}  // namespace mixtral
