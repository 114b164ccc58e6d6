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
  for (size_t word = 0; 32 * word < scores.size(); ++word) {
    const auto bits = static_cast<uint32_t>(mask.at(word));
    if (bits == ~uint32_t{0}) continue;
    const size_t count = std::min<size_t>(32, scores.size() - 32 * word);
    for (size_t i = 0; i < count; ++i)
      if ((bits >> i & 1) == 0) scores[32 * word + i] = -std::numeric_limits<float>::infinity();
  }
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

// 64 random bits of Philox4x32-10 (Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3): a function of key
// and counter alone, which are laid out as in torch's generator.
uint64_t philox(uint64_t key, uint64_t stream, uint64_t index) {
  const auto low = [](uint64_t x) { return static_cast<uint32_t>(x); };
  const auto high = [](uint64_t x) { return static_cast<uint32_t>(x >> 32); };
  uint32_t counter[4] = {low(index), high(index), low(stream), high(stream)};
  uint32_t keys[2] = {low(key), high(key)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter[0], b = uint64_t{0xCD9E8D57} * counter[2];
    counter[0] = high(b) ^ counter[1] ^ keys[0];
    counter[1] = low(b);
    counter[2] = high(a) ^ counter[3] ^ keys[1];
    counter[3] = low(a);
    keys[0] += 0x9E3779B9;
    keys[1] += 0xBB67AE85;
  }
  return uint64_t{counter[0]} << 32 | counter[1];
}

// Streams of one seed: the random numbers of its tokens, and the seeds of further samples.
constexpr uint64_t kTokens = 0, kSeeds = 1;

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
  require(std::abs(presence_penalty) <= 2, "presence_penalty", "in [-2, 2]", presence_penalty);
  require(std::abs(frequency_penalty) <= 2, "frequency_penalty", "in [-2, 2]", frequency_penalty);
  for (const auto& [id, bias] : logit_bias) {
    require(id >= 0, "logit_bias", "of token ids >= 0", id);
    require(std::abs(bias) <= 100, "logit_bias", "in [-100, 100]", bias);
  }
  for (const int64_t id : stop_token_ids) require(id >= 0, "stop_token_ids", "token ids >= 0", id);
  require(min_tokens >= 0, "min_tokens", ">= 0", min_tokens);
  require(logprobs >= 0 && logprobs <= 20, "logprobs", "in [0, 20]", logprobs);
  require(prompt_logprobs >= 0 && prompt_logprobs <= 20, "prompt_logprobs", "in [0, 20]", prompt_logprobs);
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

uint64_t sample_seed(uint64_t seed, int64_t index) {
  return index == 0 ? seed : philox(seed, kSeeds, static_cast<uint64_t>(index));
}

Sampler::Sampler(SamplingParams params, const std::vector<int64_t>& prompt_ids, std::vector<int64_t> end_ids)
    : params_(std::move(params)),
      end_ids_(std::move(end_ids)),
      seed_(params_.seed ? *params_.seed : random_seed()),
      prompt_length_(static_cast<int64_t>(prompt_ids.size())) {
  params_.validate();
  for (const auto& [id, bias] : params_.logit_bias) adjustments_[id].offset = static_cast<float>(bias);
  if (params_.repetition_penalty == 1) return;
  for (const int64_t id : prompt_ids) adjustments_[id].penalty = static_cast<float>(params_.repetition_penalty);
}

int64_t Sampler::next(const float* logits, int64_t vocab, const std::vector<int32_t>& allowed) {
  std::vector<float> scores(logits, logits + vocab);
  adjust(scores);
  if (!allowed.empty()) keep_allowed(scores, allowed);
  int64_t token = argmax(scores.data(), vocab);
  if (params_.temperature > 0) token = draw(candidates(scores, scores[static_cast<size_t>(token)]));
  take(token);
  return token;
}

void Sampler::adjust(std::vector<float>& scores) const {
  const auto vocab = static_cast<int64_t>(scores.size());
  for (const auto& [id, adjustment] : adjustments_) {
    if (id < 0 || id >= vocab) continue;  // e.g. a prompt with ids that the output layer does not have
    float& score = scores[static_cast<size_t>(id)];
    score = score < 0 ? score * adjustment.penalty : score / adjustment.penalty;
    score += adjustment.offset;
  }
  for (const int64_t id : banned())
    if (id >= 0 && id < vocab) scores[static_cast<size_t>(id)] = -std::numeric_limits<float>::infinity();
}

const std::vector<int64_t>& Sampler::banned() const {
  static const std::vector<int64_t> kNone;
  return generated_ < params_.min_tokens ? end_ids_ : kNone;
}

void Sampler::take(int64_t token) {
  ++generated_;
  const SamplingParams& p = params_;
  if (p.repetition_penalty == 1 && p.presence_penalty == 0 && p.frequency_penalty == 0) return;
  const auto bias = p.logit_bias.find(token);
  Adjustment& adjustment = adjustments_[token];
  const auto count = static_cast<double>(++adjustment.count);
  adjustment.penalty = static_cast<float>(p.repetition_penalty);
  adjustment.offset = static_cast<float>((bias == p.logit_bias.end() ? 0 : bias->second) - p.presence_penalty -
                                         p.frequency_penalty * count);
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
    for (int64_t id = 0; id < vocab; ++id)
      if (!std::isinf(scores[static_cast<size_t>(id)])) add(id);  // a mask leaves few
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
  const auto position = static_cast<uint64_t>(prompt_length_ + generated_);
  return static_cast<double>(philox(seed_, kTokens, position) >> 11) * 0x1p-53;
}

}  // namespace mixtral
