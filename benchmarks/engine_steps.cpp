// The engine's core on a model that computes nothing: what planning, page tables, results and events cost; for
// bench_engine.py.
#include <torch/extension.h>

#include <chrono>
#include <memory>
#include <utility>
#include <vector>

#include "../csrc/engine/engine_core.h"

namespace mixtral {
namespace {

Config one_layer() {
  Config config;
  config.hidden_size = config.intermediate_size = config.num_layers = config.num_heads = config.num_kv_heads = 1;
  config.head_dim = 1;
  config.vocab_size = 1000;
  config.max_position = 1 << 20;
  return config;
}

class NoModel : public Runner {
 public:
  explicit NoModel(int64_t pages) : cache_(one_layer(), {kPageSize, pages}) {}
  void launch(const std::vector<Scheduler::Chunk>& plan) override {
    std::vector<RollingKVCache::Chunk> chunks;
    for (const auto& [sequence, tokens] : plan) {
      const auto begin = sequence->ids.begin() + sequence->computed;
      chunks.push_back({sequence->cache_id, {begin, begin + tokens}});
    }
    batch_ = cache_.lay_out(chunks);
    plan_ = plan;
  }
  std::vector<Step> collect() override {
    std::vector<Step> steps;
    for (const auto& [sequence, tokens] : plan_) {
      sequence->computed += tokens;
      if (sequence->computed == sequence->length()) steps.push_back({sequence, {Sample{sequence->computed % 1000}}});
    }
    return steps;
  }
  Sample sample_held(Sequence&) const override { return {}; }
  RollingKVCache& cache() override { return cache_; }
  double pass_seconds() const override { return 1e-3; }

 private:
  RollingKVCache cache_;
  HostBatch batch_;
  std::vector<Scheduler::Chunk> plan_;
};

// -> seconds of each step in which all sequences decode.
std::vector<double> seconds_of_steps(int64_t sequences, int64_t steps) {
  const int64_t prompt = 64, length = prompt + steps + 2;
  EngineCore core(std::make_unique<NoModel>(sequences * (length / kPageSize + 2)),
                  {/*chunk_size=*/prompt, /*token_budget=*/prompt * sequences, /*max_batch=*/sequences});
  int64_t tokens = 0;
  for (int64_t id = 0; id < sequences; ++id) {
    Request request;
    for (int64_t i = 0; i < prompt; ++i) request.prompt_token_ids.push_back((id * 31 + i) % 1000);
    request.params.max_tokens = steps + 2;
    Callbacks callbacks;
    callbacks.on_progress = [&tokens](const GenerationProgress&) { return ++tokens, true; };
    callbacks.on_end = [](Outcome) {};
    core.add(std::make_unique<Sequence>(id, std::move(request), std::move(callbacks), std::nullopt));
  }
  core.step();
  std::vector<double> seconds;
  for (int64_t step = 0; step < steps; ++step) {
    const auto start = std::chrono::steady_clock::now();
    core.step();
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  TORCH_CHECK(tokens == (steps + 1) * sequences, tokens, " tokens");
  core.cancel_all();
  return seconds;
}

}  // namespace
}  // namespace mixtral

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("seconds_of_steps", &mixtral::seconds_of_steps); }
