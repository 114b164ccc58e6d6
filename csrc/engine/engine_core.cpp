#include "engine_core.h"

#include <algorithm>
#include <chrono>
#include <iterator>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "../model/memory.h"

namespace mixtral {

EngineCore::EngineCore(Mixtral model, const ModelRunner::Options& runner, const Scheduler::Options& scheduler)
    : runner_(std::move(model), runner),
      scheduler_(scheduler),
      speculator_(runner.speculate, scheduler),
      max_sessions_(static_cast<size_t>(scheduler.max_batch)) {}

void EngineCore::add(std::unique_ptr<Sequence> sequence) {
  Sequence& added = *sequence;
  added.max_pages = runner_.pages_needed(added.prompt_length(), added.params.max_tokens);
  may_admit_ = true;
  try {
    sequences_.push_back(std::move(sequence));
    scheduler_.add(added);
  } catch (...) {  // no memory
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
}

bool EngineCore::idle() const {
  const auto& running = scheduler_.running();
  return !may_admit_ && std::all_of(running.begin(), running.end(), [](const auto* s) { return s->blocked(); });
}

void EngineCore::cancel_all() {
  for (const auto& sequence : sequences_) sequence->cancel();
  end_finished();
}

void EngineCore::fail_all(const std::exception_ptr& error) {
  for (const auto& sequence : sequences_) sequence->error = error;
  end_finished();
}

SavedSession EngineCore::save_session(const std::string& name) {
  for (const Session& idle : sessions_.idle())
    if (idle.name == name) return {idle.ids, runner_.cache().contents(idle.cache_id)};
  throw std::invalid_argument("Engine: there is no idle session " + name);
}

void EngineCore::load_session(const std::string& name, SavedSession saved) {
  drop(sessions_.take(name));
  const int64_t pages = saved.contents.keys.at(0).size(0);
  const int64_t needed = scheduler_.reserved_pages() + idle_pages_but("") + pages;
  runner_.grow(needed, needed);
  add_session({name, runner_.cache().add_sequence(saved.contents), std::move(saved.ids)});
}

void EngineCore::step() {
  admit();
  sample_held();
  run_pass();
  end_finished();
}

// ---- admission ------------------------------------------------------------------------------------------------------

void EngineCore::admit() {
  if (!std::exchange(may_admit_, false)) return;
  while (Sequence* const next = scheduler_.next()) {
    try {
      if (!make_room(*next)) return;
      if (!scheduler_.admit(runner_.num_pages() - idle_pages_but(next->session)))
        throw std::logic_error("Engine: the page pool is smaller than the requests in it need");
      start(*next);
    } catch (...) {  // it can never fit
      next->error = std::current_exception();
      scheduler_.remove(*next);
    }
  }
}

// Lets the pool grow, and drops idle sessions if memory has no room for that, until the pages of `next` fit. Returns
// false when they have to wait for those of running requests. Throws OutOfMemory when there are none.
bool EngineCore::make_room(const Sequence& next) {
  for (;;) {
    const int64_t idle = idle_pages_but(next.session);
    try {
      runner_.grow(scheduler_.reserved_pages() + next.max_pages + idle, scheduler_.wanted_pages() + idle);
      return true;
    } catch (const OutOfMemory&) {
      if (drop(sessions_.take_oldest_but(next.session))) continue;
      if (!scheduler_.running().empty()) return false;
      if (!drop(sessions_.take(next.session))) throw;
    }
  }
}

// Gives the sequence a place in the cache: that of its session, as far as the tokens are the same.
void EngineCore::start(Sequence& sequence) {
  RollingKVCache& cache = runner_.cache();
  if (auto session = sessions_.take(sequence.session)) {
    const auto& prompt = sequence.ids;
    const size_t most = std::min(session->ids.size(), prompt.size() - 1);  // one token must be computed, for its logits
    const auto end = session->ids.begin() + static_cast<std::ptrdiff_t>(most);
    const int64_t common = std::mismatch(session->ids.begin(), end, prompt.begin()).first - session->ids.begin();
    if (common > 0 && cache.truncate(session->cache_id, common)) {
      sequence.cache_id = session->cache_id;
      sequence.computed = common;
      sequence.timings->cached_tokens += common;
      return;
    }
    cache.remove_sequence(session->cache_id);
  }
  sequence.cache_id = cache.add_sequence();
}

int64_t EngineCore::idle_pages_but(const std::string& session) {
  int64_t pages = 0;
  for (const Session& idle : sessions_.idle())
    if (idle.name != session) pages += runner_.cache().pages_held(idle.cache_id);
  return pages;
}

bool EngineCore::drop(const std::optional<Session>& session) {
  if (session) runner_.cache().remove_sequence(session->cache_id);
  return session.has_value();
}

// ---- a forward pass
// --------------------------------------------------------------------------------------------------

// The next tokens of constrained sequences whose masks have come.
void EngineCore::sample_held() {
  for (const auto& sequence : sequences_) {
    if (sequence->held_logits.empty() || sequence->allowed.empty()) continue;
    take({sequence.get(), {runner_.sample_held(*sequence)}});
  }
  end_finished();
}

void EngineCore::run_pass() {
  const auto plan = scheduler_.plan();
  if (plan.empty()) return;
  const bool prefill = std::any_of(plan.begin(), plan.end(), [](const auto& c) { return c.sequence->in_prefill(); });
  const auto seconds = [start = std::chrono::steady_clock::now()] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  speculator_.propose(plan);
  const std::vector<Step> steps = runner_.run(plan);
  speculator_.learn(steps, seconds());
  for (const auto& chunk : plan)
    if (chunk.sequence->in_prefill()) show(*chunk.sequence, "");
  for (const Step& step : steps) take(step);
  for (const auto& chunk : plan) chunk.sequence->draft.clear();
  std::set<Timings*> timings;  // the requests of one call share theirs
  for (const auto& chunk : plan) timings.insert(chunk.sequence->timings.get());
  for (Timings* each : timings) {
    (prefill ? each->prefill_seconds : each->decode_seconds) += seconds();
    each->peak_pages = std::max(each->peak_pages, runner_.pages_in_use());
  }
}

// Appends the picked tokens until the sequence ends; those behind the end are forgotten.
void EngineCore::take(const Step& step) {
  Sequence& sequence = *step.sequence;
  sequence.timings->drafted_tokens += static_cast<int64_t>(sequence.draft.size());
  sequence.timings->accepted_tokens += static_cast<int64_t>(step.samples.size()) - 1;
  std::optional<std::string> text;
  for (const Sample& sample : step.samples) {
    if (sequence.finished()) break;
    const auto piece = sequence.append(sample);
    if (piece) text = text.value_or("") + *piece;
  }
  if (sequence.computed > sequence.length()) {
    sequence.computed = sequence.length();
    runner_.cache().truncate(sequence.cache_id, sequence.computed);
  }
  if (text || sequence.generation.trace) show(sequence, text.value_or(""));
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
// ------------------------------------------------------------------------------------------------------------

void EngineCore::end_finished() {
  const auto runs = [](const auto& sequence) { return !sequence->finished(); };
  const auto first = std::stable_partition(sequences_.begin(), sequences_.end(), runs);
  std::vector<std::unique_ptr<Sequence>> ended(std::make_move_iterator(first),
                                               std::make_move_iterator(sequences_.end()));
  sequences_.erase(first, sequences_.end());
  for (const auto& sequence : ended) end(*sequence);
}

void EngineCore::end(Sequence& sequence) noexcept {
  scheduler_.remove(sequence);
  if (sequence.cache_id >= 0) {
    try {
      if (sequence.failed()) runner_.cache().clear_sequence(sequence.cache_id);
      keep_session(sequence);
    } catch (...) {  // no memory to remember it
    }
    if (sequence.cache_id >= 0) runner_.cache().remove_sequence(sequence.cache_id);
  }
  may_admit_ = true;
  Timings& timings = *sequence.timings;
  timings.prompt_tokens += sequence.prompt_length();
  timings.new_tokens += static_cast<int64_t>(sequence.generation.token_ids.size());
  if (sequence.callbacks.on_end) sequence.callbacks.on_end({std::move(sequence.generation), timings, sequence.error});
}

// Leaves the keys and values in the cache for the session's next request.
void EngineCore::keep_session(Sequence& sequence) {
  if (sequence.session.empty() || sequence.failed() || sequence.computed == 0) return;
  drop(sessions_.take(sequence.session));  // of a request that ended while this one ran
  sequence.ids.resize(static_cast<size_t>(sequence.computed));
  add_session({sequence.session, sequence.cache_id, std::move(sequence.ids)});
  sequence.cache_id = -1;
}

void EngineCore::add_session(Session session) {
  sessions_.add(std::move(session));
  if (sessions_.idle().size() > max_sessions_) drop(sessions_.take_oldest_but(""));
}

}  // namespace mixtral
