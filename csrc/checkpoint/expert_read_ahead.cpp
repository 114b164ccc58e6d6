#include "expert_read_ahead.h"

#include <algorithm>
#include <map>
#include <string>
#include <utility>

#include "../model/ops.h"

namespace mixtral {
namespace {

// Of one expert of a weight [E, ...].
PageRange pages_of_expert(const torch::Tensor& weight, int64_t expert) {
  const auto bytes = static_cast<int64_t>(weight.nbytes()) / weight.size(0);
  return pages_around(static_cast<const char*>(weight.const_data_ptr()) + expert * bytes, static_cast<uint64_t>(bytes));
}

}  // namespace

ExpertReadAhead::ExpertReadAhead(const MappedWeights& weights)
    : shows_residency_(weights.shows_residency), thread_([this] { work(); }) {
  std::vector<std::string> read_in_parts = weights.experts;
  if (weights.parameters.count("embed_tokens") && weights.parameters.count("lm_head"))
    read_in_parts.emplace_back("embed_tokens");  // rows; when it is the lm_head too, every token reads all of it
  for (const std::string& name : read_in_parts) {
    const torch::Tensor& weight = weights.parameters.at(name);
    read_alone(pages_around(weight.const_data_ptr(), weight.nbytes()));
  }
  // Every token needs the others. Their first touch would bring megabytes of the experts beside them along.
  for (const auto& [name, weight] : weights.parameters)
    if (std::find(read_in_parts.begin(), read_in_parts.end(), name) == read_in_parts.end())
      read_ahead(pages_around(weight.const_data_ptr(), weight.nbytes()));
}

ExpertReadAhead::~ExpertReadAhead() {
  {
    const std::lock_guard lock(mutex_);
    stopped_ = true;
  }
  changed_.notify_one();
  thread_.join();
}

torch::Tensor ExpertReadAhead::run(int64_t, const torch::Tensor& x, const torch::Tensor& topk_weights,
                                   const torch::Tensor& topk_ids, const torch::Tensor& gate_up_proj,
                                   const torch::Tensor& down_proj) {
  choose(topk_ids, gate_up_proj, down_proj);
  return ops::moe_mlp(x, topk_weights, topk_ids, gate_up_proj, down_proj);
}

void ExpertReadAhead::choose(const torch::Tensor& topk_ids, const torch::Tensor& gate_up_proj,
                             const torch::Tensor& down_proj) {
  std::map<int32_t, int64_t> choices;
  const auto ids = topk_ids.contiguous();
  for (int64_t i = 0; i < ids.numel(); ++i) {
    const int32_t id = ids.const_data_ptr<int32_t>()[i];
    if (0 <= id && id < gate_up_proj.size(0)) ++choices[id];
  }
  Layer layer;
  for (const auto& [id, count] : choices)
    layer.push_back({count, pages_of_expert(gate_up_proj, id), pages_of_expert(down_proj, id)});
  {
    const std::lock_guard lock(mutex_);
    queue_.push_back(std::move(layer));
  }
  changed_.notify_one();
}

ExpertCounts ExpertReadAhead::counts() const {
  std::unique_lock lock(mutex_);
  done_.wait(lock, [this] { return queue_.empty() && !busy_; });
  return counts_;
}

void ExpertReadAhead::work() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return stopped_ || !queue_.empty(); });
    if (stopped_) return;
    const Layer layer = std::move(queue_.front());
    queue_.pop_front();
    busy_ = true;
    lock.unlock();
    const ExpertCounts counts = ask_for(layer);
    lock.lock();
    counts_.hits += counts.hits;
    counts_.misses += counts.misses;
    counts_.bytes += counts.bytes;
    busy_ = false;
    done_.notify_all();
  }
}

// In the order in which the experts are computed: gate and up of all of them, then down.
ExpertCounts ExpertReadAhead::ask_for(const Layer& layer) const {
  std::vector<uint64_t> asked;
  for (const Chosen& expert : layer) asked.push_back(ask_for(expert.gate_up));
  ExpertCounts counts;
  for (size_t i = 0; i < layer.size(); ++i) {
    asked[i] += ask_for(layer[i].down);
    (asked[i] == 0 ? counts.hits : counts.misses) += layer[i].choices;
    counts.bytes += asked[i];
  }
  return counts;
}

// Returns the bytes that were not in memory.
uint64_t ExpertReadAhead::ask_for(const PageRange& range) const {
  uint64_t bytes = 0;
  for (const PageRange& missing : shows_residency_ ? missing_pages(range) : std::vector<PageRange>{range}) {
    read_ahead(missing);
    bytes += missing.bytes;
  }
  return bytes;
}

}  // namespace mixtral
