// A model that is nothing but its key/value cache: for tests of the engine that need thousands of schedules.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <deque>
#include <functional>
#include <set>
#include <stdexcept>

#include "engine/engine_core.h"
#include "tiny_model.h"

namespace mixtral {

inline uint64_t mixed(uint64_t value) {  // the finalizer of SplitMix64
  value += 0x9e3779b97f4a7c15;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
  value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
  return value ^ (value >> 31);
}

// The "key" of a token: of its id, its position, the number of experts, and of all keys that it sees. So one wrong key
// changes everything behind it.
inline uint64_t fake_key(int64_t id, int64_t position, int64_t experts, uint64_t sum_of_visible) {
  return mixed(static_cast<uint64_t>(id) + mixed(static_cast<uint64_t>(position * 16 + experts) + sum_of_visible));
}

inline constexpr int64_t kFakeVocab = 3;  // few: requests often begin alike

inline Sample fake_sample(uint64_t key) {
  Sample sample;
  sample.token_id = static_cast<int64_t>(key % kFakeVocab);
  sample.logprob = TokenLogprob{sample.token_id, static_cast<double>(key >> 11), {}};
  return sample;
}

// The new tokens of a request that has the engine to itself.
inline std::vector<Sample> fake_samples(std::vector<int64_t> ids, int64_t count, int64_t window, int64_t experts) {
  std::vector<uint64_t> keys;
  std::vector<Sample> samples;
  while (static_cast<int64_t>(samples.size()) < count) {
    while (keys.size() < ids.size()) {
      const auto position = static_cast<int64_t>(keys.size());
      uint64_t sum = 0;
      for (int64_t p = window ? std::max<int64_t>(0, position - window + 1) : 0; p < position; ++p)
        sum += keys[static_cast<size_t>(p)];
      keys.push_back(fake_key(ids[keys.size()], position, experts, sum));
    }
    samples.push_back(fake_sample(keys.back()));
    ids.push_back(samples.back().token_id);
  }
  return samples;
}

class FakeRunner : public Runner {
 public:
  FakeRunner(int64_t window, int64_t page_size, int64_t num_pages, int64_t chunk)
      : window_(window),
        page_size_(page_size),
        cache_(config(window), {page_size, num_pages, chunk, torch::kCPU, torch::kFloat32}),
        keys_(static_cast<size_t>(num_pages * page_size)) {}

  static Config config(int64_t window) {
    Config config = tiny_config(4, 2, window);
    config.num_layers = config.num_kv_heads = config.head_dim = 1;
    return config;
  }

  void launch(const std::vector<Scheduler::Chunk>& plan) override {
    if (before_launch) before_launch();  // may throw
    std::vector<RollingKVCache::Chunk> chunks;
    for (const auto& [sequence, tokens] : plan) {
      const auto begin = sequence->ids.begin() + sequence->computed;
      chunks.push_back({sequence->cache_id, {begin, begin + tokens}});
      chunks.back().input_ids.insert(chunks.back().input_ids.end(), sequence->draft.begin(), sequence->draft.end());
      EXPECT_TRUE(in_flight_.insert(sequence).second) << "request " << sequence->id << " is in two passes";
    }
    passes_.push_back({plan, cache_.lay_out(chunks)});
  }

  // Computes as late as may be: what others do to the pages of a pass in flight changes its keys.
  std::vector<Step> collect() override {
    const Pass pass = std::move(passes_.front());
    const auto& [plan, batch] = pass;
    passes_.pop_front();
    for (const auto& chunk : plan) in_flight_.erase(chunk.sequence);
    if (before_pass) before_pass();  // may throw
    std::vector<Step> steps;
    size_t token = 0, row = 0;
    for (const auto& [sequence, tokens] : plan) {
      const int64_t* pages = batch.page_table.data() + static_cast<int64_t>(row++) * batch.columns;
      const auto key_at = [&](int64_t p) -> uint64_t& {
        return keys_.at(static_cast<size_t>(pages[(p / page_size_) % batch.columns] * page_size_ + p % page_size_));
      };
      for (int64_t i = 0; i < tokens + static_cast<int64_t>(sequence->draft.size()); ++i, ++token) {
        const int64_t position = batch.positions[token];
        uint64_t sum = 0;
        for (int64_t p = window_ ? std::max<int64_t>(0, position - window_ + 1) : 0; p < position; ++p)
          sum += key_at(p);
        keys_.at(static_cast<size_t>(batch.slot_mapping[token])) =
            fake_key(batch.input_ids[token], position, sequence->experts_per_token, sum);
      }
      sequence->computed += tokens;
      if (sequence->computed < sequence->length()) continue;
      std::vector<Sample> samples = {fake_sample(key_at(sequence->computed - 1))};
      for (const int64_t guess : sequence->draft) {
        if (samples.back().token_id != guess) break;
        samples.push_back(fake_sample(key_at(sequence->computed++)));
      }
      cache_.truncate(sequence->cache_id, sequence->computed);
      if (is_nan && is_nan()) samples.back().error = "NaN";
      steps.push_back({sequence, std::move(samples)});
    }
    seconds_ = 1 + seconds_of_a_token * static_cast<double>(token);  // in place of a clock
    return steps;
  }
  RollingKVCache& cache() override { return cache_; }
  double pass_seconds() const override { return seconds_; }
  Sample sample_held(Sequence&) const override { throw std::logic_error("nothing is constrained"); }
  void ping() override { on_ping(); }
  double ping_seconds() const override { return on_ping ? 1e-3 : 0; }

  std::function<void()> before_launch, before_pass;  // before the pass is computed
  std::function<bool()> is_nan;
  std::function<void()> on_ping;  // set: it has other ranks
  double seconds_of_a_token = 0.05;

 private:
  struct Pass {
    std::vector<Scheduler::Chunk> plan;
    HostBatch batch;
  };
  int64_t window_, page_size_;
  RollingKVCache cache_;
  std::vector<uint64_t> keys_;  // of each slot
  std::deque<Pass> passes_;
  std::set<const Sequence*> in_flight_;
  double seconds_ = 0;
};

}  // namespace mixtral
