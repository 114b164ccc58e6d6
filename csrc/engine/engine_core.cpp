#include "engine_core.h"

#include <algorithm>
#include <iterator>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "../distributed/communicator.h"

namespace mixtral {

EngineCore::EngineCore(std::unique_ptr<Runner> runner, const Scheduler::Options& scheduler, int64_t speculate,
                       std::unique_ptr<PlanTrace> plan_trace)
    : runner_(std::move(runner)),
      scheduler_(scheduler, runner_->cache()),
      depth_(static_cast<size_t>(scheduler.depth)),
      speculator_(speculate, scheduler, runner_->cache()),
      plan_trace_(std::move(plan_trace)) {
  publish_stats();
}

void EngineCore::add(std::unique_ptr<Sequence> sequence) {
  Sequence& added = *sequence;
  may_run_ = true;
  try {
    sequences_.push_back(std::move(sequence));
    scheduler_.add(added);
    if (const auto error = failure()) std::rethrow_exception(error);
  } catch (...) {  // that, or no memory
    added.error = std::current_exception();
    sequence ? end(added) : end_finished();
  }
}

void EngineCore::cancel(int64_t id) {
  for (const auto& sequence : sequences_)
    if (sequence->id == id) sequence->cancel();
  end_finished();
}

void EngineCore::allow(int64_t id, std::vector<int32_t> mask) {
  for (const auto& sequence : sequences_)
    if (sequence->id == id && sequence->constrained) sequence->allowed = std::move(mask);
  may_run_ = true;
}

void EngineCore::cancel_all() {
  for (const auto& sequence : sequences_) sequence->cancel();
  collect_all();
}

void EngineCore::fail_all(const std::exception_ptr& error) {
  for (const auto& sequence : sequences_) sequence->error = error;
  collect_all();
}

void EngineCore::step() {
  sample_held();
  if (after_pass) after_pass();  // the next masks of what was picked can be made while the pass runs
  while (passes_.size() < depth_ && launch()) {
  }
  if (!passes_.empty()) collect();
  end_finished();
  publish_stats();
}

void EngineCore::ping() {
  if (failure()) return;
  try {
    runner_->ping();
  } catch (...) {
    fail_for_good(std::current_exception());
  }
  end_finished();
}

EngineStats EngineCore::stats() const {
  EngineStats stats = scheduler_.stats();
  stats.computed_tokens = computed_tokens_;
  stats.generated_tokens = generated_tokens_;
  return stats;
}

void EngineCore::publish_stats() {
  const std::lock_guard lock(mutex_);
  published_stats_ = stats();
}

EngineStats EngineCore::published_stats() const {
  const std::lock_guard lock(mutex_);
  return published_stats_;
}

std::exception_ptr EngineCore::failure() const {
  const std::lock_guard lock(mutex_);
  return failure_;
}

void EngineCore::check_integrity() const {
  scheduler_.check_integrity();
  runner_->cache().check_integrity();
  const EngineStats now = scheduler_.stats();
  if (now.running + now.waiting != static_cast<int64_t>(sequences_.size()))
    throw std::logic_error("EngineCore: a request neither runs nor waits");
  if (now.running == 0 && now.pages_in_use != 0) throw std::logic_error("EngineCore: pages are in use by no request");
}

// ---- forward passes

// The next tokens of constrained sequences whose masks have come.
void EngineCore::sample_held() {
  for (const auto& sequence : sequences_) {
    if (sequence->held_logits.empty() || sequence->allowed.empty()) continue;
    take({sequence.get(), {runner_->sample_held(*sequence)}});
  }
  end_finished();
}

// Returns false when there is nothing to compute.
bool EngineCore::launch() {
  Pass pass;
  pass.plan = scheduler_.plan();
  may_run_ = !pass.plan.empty();
  if (pass.plan.empty()) return false;
  pass.pages = runner_->cache().pages_in_use();
  pass.preemptions = scheduler_.stats().preemptions;
  pass.reads_prompts =
      std::any_of(pass.plan.begin(), pass.plan.end(), [](const auto& chunk) { return chunk.sequence->in_prefill(); });
  pass.launched = Clock::now();
  const auto& plan = passes_.emplace_back(std::move(pass)).plan;
  try {
    passes_.back().learns = speculator_.propose(plan);
    runner_->launch(plan);
    for (const auto& chunk : plan) chunk.sequence->in_flight = true;
  } catch (const RankError&) {
    fail_for_good(std::current_exception());
  } catch (...) {
    for (const auto& chunk : plan) chunk.sequence->error = std::current_exception();
    passes_.pop_back();
  }
  end_finished();
  return true;
}

// The oldest pass.
void EngineCore::collect() {
  const Pass pass = std::move(passes_.front());
  passes_.pop_front();
  may_run_ = true;
  for (const auto& chunk : pass.plan) chunk.sequence->in_flight = false;
  try {
    finish(pass);
  } catch (const RankError&) {
    return fail_for_good(std::current_exception());
  } catch (...) {
    for (const auto& chunk : pass.plan) chunk.sequence->error = std::current_exception();
  }
  for (const auto& chunk : pass.plan) chunk.sequence->draft.clear();
  const auto now = Clock::now();
  const std::chrono::duration<double> seconds = now - std::max(pass.launched, collected_);
  collected_ = now;
  std::set<Timings*> timings;  // the requests of one call share theirs
  for (const auto& chunk : pass.plan) timings.insert(chunk.sequence->timings.get());
  for (Timings* each : timings) {
    (pass.reads_prompts ? each->prefill_seconds : each->decode_seconds) += seconds.count();
    each->peak_pages = std::max(each->peak_pages, pass.pages);
  }
}

void EngineCore::collect_all() {
  while (!passes_.empty()) collect();
  end_finished();
}

void EngineCore::finish(const Pass& pass) {
  const std::vector<Step> steps = runner_->collect();
  double seconds = runner_->pass_seconds();
  if (plan_trace_) seconds = plan_trace_->add(pass.plan, pass.preemptions, steps, seconds);
  if (pass.learns && steps.size() == pass.plan.size()) speculator_.learn(steps, seconds);
  for (const auto& [sequence, tokens] : pass.plan) {
    computed_tokens_ += tokens;
    if (sequence->in_prefill() && !sequence->finished()) show(*sequence, "");
  }
  for (const Step& step : steps) take(step);
  for (const auto& chunk : pass.plan)
    if (!chunk.sequence->failed()) runner_->cache().commit(chunk.sequence->cache_id, chunk.sequence->ids);
}

// Appends the picked tokens until the sequence ends; those behind the end are forgotten.
void EngineCore::take(const Step& step) {
  Sequence& sequence = *step.sequence;
  computed_tokens_ += static_cast<int64_t>(sequence.draft.size());
  sequence.timings->drafted_tokens += static_cast<int64_t>(sequence.draft.size());
  sequence.timings->accepted_tokens += static_cast<int64_t>(step.samples.size()) - 1;
  const bool ended = sequence.finished();  // while it was in flight
  const size_t before = sequence.generation.token_ids.size();
  std::optional<std::string> text;
  for (const Sample& sample : step.samples) {
    if (sequence.finished()) break;
    const auto piece = sequence.append(sample);
    if (piece) text = text.value_or("") + *piece;
  }
  generated_tokens_ += static_cast<int64_t>(sequence.generation.token_ids.size() - before);
  if (sequence.computed > sequence.length()) {
    sequence.computed = sequence.length();
    runner_->cache().truncate(sequence.cache_id, sequence.computed);
  }
  if (!ended && (text || sequence.generation.trace)) show(sequence, text.value_or(""));
}

void EngineCore::show(Sequence& sequence, const std::string& text) {
  if (!sequence.callbacks.on_progress || sequence.error) return;
  const Generation& generation = sequence.generation;
  const GenerationProgress progress = {text, generation, sequence.shown_tokens, sequence.shown_rows};
  sequence.shown_tokens = generation.token_ids.size();
  if (generation.trace) sequence.shown_rows = generation.trace->tokens();
  try {
    if (!sequence.callbacks.on_progress(progress) && !sequence.finished()) sequence.cancel();
  } catch (...) {
    sequence.error = std::current_exception();
  }
}

// ---- ends

void EngineCore::end_finished() {
  const auto stays = [](const auto& sequence) { return !sequence->finished() || sequence->in_flight; };
  const auto first = std::stable_partition(sequences_.begin(), sequences_.end(), stays);
  std::vector<std::unique_ptr<Sequence>> ended(std::make_move_iterator(first),
                                               std::make_move_iterator(sequences_.end()));
  sequences_.erase(first, sequences_.end());
  for (const auto& sequence : ended) end(*sequence);
  if (!sequences_.empty() && failure()) end_finished();  // what ended has met the failure
}

void EngineCore::end(Sequence& sequence) noexcept {
  try {
    scheduler_.remove(sequence);
  } catch (...) {  // its pages are free, and not zero on every rank
    fail_for_good(std::current_exception());
  }
  may_run_ = true;
  Timings& timings = *sequence.timings;
  timings.prompt_tokens += sequence.prompt_length();
  timings.new_tokens += static_cast<int64_t>(sequence.generation.token_ids.size());
  sequence.seat.reset();
  publish_stats();
  if (sequence.callbacks.on_end) sequence.callbacks.on_end({std::move(sequence.generation), timings, sequence.error});
}

// Nothing comes of what is in flight.
void EngineCore::fail_for_good(const std::exception_ptr& error) noexcept {
  passes_.clear();
  for (const auto& sequence : sequences_) {
    sequence->in_flight = false;
    sequence->error = error;
  }
  const std::lock_guard lock(mutex_);
  if (!failure_) failure_ = error;
}

// ---- prompt caches

PromptCache EngineCore::save_prompt_cache(std::vector<int64_t> ids, int64_t experts_per_token) {
  RollingKVCache& cache = runner_->cache();
  PromptCache saved;
  const int64_t sequence = cache.add_sequence(ids, static_cast<int64_t>(ids.size()), experts_per_token);
  saved.contents = cache.contents(sequence);
  cache.remove_sequence(sequence);
  ids.resize(static_cast<size_t>(saved.contents.length));
  saved.ids = std::move(ids);
  return saved;
}

void EngineCore::load_prompt_cache(const PromptCache& saved, int64_t experts_per_token) {
  runner_->cache().load(saved.contents, saved.ids, experts_per_token);
}

}  // namespace mixtral
