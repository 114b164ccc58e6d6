// The engine without its thread: runs one forward pass after the other, hands out text and results.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "prompt_cache_file.h"
#include "runner.h"
#include "scheduler.h"
#include "sequence.h"
#include "speculator.h"

namespace mixtral {

// Used by one thread. No method throws because of a request: what goes wrong with one ends that request.
class EngineCore {
 public:
  // speculate: most tokens to guess (speculator.h).
  EngineCore(std::unique_ptr<Runner> runner, const Scheduler::Options& scheduler, int64_t speculate = 0);

  void add(std::unique_ptr<Sequence> sequence);
  void cancel(int64_t id);                            // does nothing if no request has this id
  void allow(int64_t id, std::vector<int32_t> mask);  // of the next token of a constrained request, if there is one
  bool idle() const { return !may_run_; }             // there is nothing to do until one of these calls comes
  // Runs one forward pass.
  void step();
  void cancel_all();
  void fail_all(const std::exception_ptr& error);

  // What the prefix cache has of the full pages of `ids`.
  PromptCache save_prompt_cache(std::vector<int64_t> ids, int64_t experts_per_token);
  // Throws OutOfMemory.
  void load_prompt_cache(const PromptCache& saved, int64_t experts_per_token);

  EngineStats stats() const;
  EngineStats published_stats() const;  // as of the last pass, or the last end of a request; from any thread
  // Throws std::logic_error when pages, sequences and the prefix cache contradict each other.
  void check_integrity() const;

  // Called after the callbacks of each pass, and after those of tokens picked with masks: one wake-up for all of them.
  std::function<void()> after_pass;

 private:
  void sample_held();
  void run_pass();
  void take(const Step& step);
  void publish_stats();
  void show(Sequence& sequence, const std::string& text);
  void end_finished();
  void end(Sequence& sequence) noexcept;

  std::unique_ptr<Runner> runner_;
  Scheduler scheduler_;
  Speculator speculator_;
  std::vector<std::unique_ptr<Sequence>> sequences_;  // waiting and running, in the order of arrival
  bool may_run_ = false;                              // something changed since a plan was empty
  int64_t computed_tokens_ = 0, generated_tokens_ = 0;
  mutable std::mutex stats_mutex_;  // of what follows
  EngineStats published_stats_;
};

}  // namespace mixtral
