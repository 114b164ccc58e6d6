// The engine without its thread: launches and collects forward passes, hands out text and results.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "plan_trace.h"
#include "prompt_cache_file.h"
#include "runner.h"
#include "scheduler.h"
#include "sequence.h"
#include "speculator.h"

namespace mixtral {

// Used by one thread. No method throws because of a request: what goes wrong with one ends that request. A request that
// is in flight ends once its pass is collected. A RankError ends all requests, those too that come later.
class EngineCore {
 public:
  // speculate: most tokens to guess (speculator.h). plan_trace: gets every pass; may be null.
  EngineCore(std::unique_ptr<Runner> runner, const Scheduler::Options& scheduler, int64_t speculate = 0,
             std::unique_ptr<PlanTrace> plan_trace = nullptr);

  void add(std::unique_ptr<Sequence> sequence);
  void cancel(int64_t id);                            // does nothing if no request has this id
  void allow(int64_t id, std::vector<int32_t> mask);  // of the next token of a constrained request, if there is one
  // There is nothing to do until one of these calls comes.
  bool idle() const { return !may_run_ && passes_.empty(); }
  // Launches passes until as many as may be are in flight, and collects the oldest.
  void step();
  void cancel_all();
  void fail_all(const std::exception_ptr& error);
  // Tells the other ranks that this one lives, every ping_seconds() while there is nothing to do; 0: nobody needs it.
  void ping();
  double ping_seconds() const { return runner_->ping_seconds(); }
  // The RankError that ended the engine, or null; from any thread.
  std::exception_ptr failure() const;

  // What the prefix cache has of the full pages of `ids`.
  PromptCache save_prompt_cache(std::vector<int64_t> ids, int64_t experts_per_token);
  // Throws OutOfMemory.
  void load_prompt_cache(const PromptCache& saved, int64_t experts_per_token);

  EngineStats stats() const;
  EngineStats published_stats() const;  // as of the last pass, or the last end of a request; from any thread
  // Throws std::logic_error when pages, sequences and the prefix cache contradict each other.
  void check_integrity() const;
  PlanTrace* plan_trace() const { return plan_trace_.get(); }

  // Called after the callbacks of each pass, and after those of tokens picked with masks: one wake-up for all of them.
  std::function<void()> after_pass;

 private:
  using Clock = std::chrono::steady_clock;
  struct Pass {  // in flight
    std::vector<Scheduler::Chunk> plan;
    int64_t pages = 0, preemptions = 0;          // in use, and so far, when it was planned
    bool reads_prompts = false, learns = false;  // learns: the speculator from it
    Clock::time_point launched;
  };

  void sample_held();
  bool launch();
  void collect();
  void collect_all();
  void finish(const Pass& pass);
  void take(const Step& step);
  void publish_stats();
  void show(Sequence& sequence, const std::string& text);
  void end_finished();
  void end(Sequence& sequence) noexcept;
  void fail_for_good(const std::exception_ptr& error) noexcept;

  std::unique_ptr<Runner> runner_;
  Scheduler scheduler_;
  const size_t depth_;
  Speculator speculator_;
  std::unique_ptr<PlanTrace> plan_trace_;             // or null
  std::vector<std::unique_ptr<Sequence>> sequences_;  // waiting and running, in the order of arrival
  std::deque<Pass> passes_;                           // in flight, the oldest first
  Clock::time_point collected_;                       // the last one
  bool may_run_ = false;                              // something changed since a plan was empty
  int64_t computed_tokens_ = 0, generated_tokens_ = 0;
  mutable std::mutex mutex_;  // of what follows
  EngineStats published_stats_;
  std::exception_ptr failure_;
};

}  // namespace mixtral
