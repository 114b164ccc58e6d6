#include "scheduler.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "../model/rolling_kv_cache.h"

namespace mixtral {

void Scheduler::remove(Sequence& sequence) {
  waiting_.erase(std::remove(waiting_.begin(), waiting_.end(), &sequence), waiting_.end());
  running_.erase(std::remove(running_.begin(), running_.end(), &sequence), running_.end());
  if (sequence.cache_id >= 0) leave_cache(sequence);
}

std::vector<Scheduler::Chunk> Scheduler::plan() {
  std::vector<Chunk> chunks;
  Budget left = budget();
  const int64_t before = totals_.preemptions;
  size_t share = share_of_pass(runnable());
  for (size_t i = 0; i < running_.size() && chunks.size() < share; ++i)  // running_ may get shorter
    if (!add_chunk(*running_[i], left, chunks)) return chunks;
  if (totals_.preemptions > before) return chunks;
  share = share_of_pass(std::min(runnable() + static_cast<int64_t>(waiting_.size()), options_.max_batch));
  while (std::min(left.tokens, left.prefill_tokens) > 0 && chunks.size() < share && admit())
    if (!add_chunk(*running_.back(), left, chunks)) break;
  return chunks;
}

// Of the requests that run, those that are in a pass or could be.
int64_t Scheduler::runnable() const {
  return std::count_if(running_.begin(), running_.end(),
                       [](const Sequence* s) { return s->in_flight || s->computed < s->length(); });
}

size_t Scheduler::share_of_pass(int64_t sequences) const {
  return static_cast<size_t>((sequences + options_.depth - 1) / options_.depth);
}

Scheduler::Budget Scheduler::budget() const {
  const auto decodes = [](const Sequence* sequence) { return sequence->length() - sequence->computed <= 1; };
  const int64_t mixed = options_.mixed_chunk_size;
  if (mixed == 0 || std::none_of(running_.begin(), running_.end(), decodes))
    return {options_.token_budget, options_.token_budget, options_.chunk_size};
  return {options_.token_budget, 2 * mixed, std::min(mixed, options_.chunk_size)};
}

// As many tokens of the sequence as chunk and budget allow, if there are pages for them once newer sequences have given
// theirs back. Returns false when it waits for pages, with those it has.
bool Scheduler::add_chunk(Sequence& sequence, Budget& budget, std::vector<Chunk>& chunks) {
  const int64_t left = sequence.length() - sequence.computed;
  const bool decodes = left <= 1;
  const int64_t tokens =
      std::min({left, budget.chunk_size, budget.tokens, decodes ? budget.tokens : budget.prefill_tokens});
  // In a pass already, or nothing is left of the budget, or it waits for the mask of its next token.
  if (sequence.in_flight || tokens == 0) return true;
  while (!cache_.reserve(sequence.cache_id, tokens)) {
    if (running_.back() == &sequence || running_.back()->in_flight) return false;
    preempt(*running_.back());
  }
  chunks.push_back({&sequence, tokens});
  budget.tokens -= tokens;
  if (!decodes) budget.prefill_tokens -= tokens;
  return true;
}

void Scheduler::preempt(Sequence& sequence) {
  waiting_.push_front(&sequence);
  running_.pop_back();
  leave_cache(sequence);
  ++totals_.preemptions;
}

// The request that has waited for longest runs if there are pages for all of its tokens, beside those that the running
// ones will take soon, and nobody else is computing what it can share.
bool Scheduler::admit() {
  const auto running = static_cast<int64_t>(running_.size());
  if (waiting_.empty() || running == options_.max_batch) return false;
  Sequence& next = *waiting_.front();
  next.cache_id = shares_pages(next) ? cache_.add_sequence(next.ids, next.cacheable_tokens(), next.experts_per_token)
                                     : cache_.add_sequence();
  int64_t needed = pages_to_take(next, 1);
  for (const Sequence* sequence : running_) needed += pages_to_take(*sequence, options_.headroom);
  if (running > 0 && (needed > cache_.pages_available() || others_compute_its_prefix(next))) {
    leave_cache(next);
    return false;
  }
  next.computed = cache_.length(next.cache_id);
  running_.push_back(&next);
  waiting_.pop_front();
  if (!std::exchange(next.counted, true)) count(next);
  return true;
}

// A running request is about to compute full pages that the cache does not have yet, and that `next` can share.
bool Scheduler::others_compute_its_prefix(const Sequence& next) const {
  if (!shares_pages(next)) return false;
  const auto is_computing = [&](const Sequence* other) {
    if (!other->in_prefill() || !shares_pages(*other) || other->experts_per_token != next.experts_per_token)
      return false;
    const auto end = next.ids.begin() + std::min(next.cacheable_tokens(), other->prompt_length());
    const int64_t common = std::mismatch(next.ids.begin(), end, other->ids.begin()).first - next.ids.begin();
    const int64_t shareable = common - common % cache_.page_size();
    return other->computed < shareable && cache_.length(next.cache_id) < shareable;
  };
  return std::any_of(running_.begin(), running_.end(), is_computing);
}

// For the tokens that it has, and for at most `more` of those that it may generate.
int64_t Scheduler::pages_to_take(const Sequence& sequence, int64_t more) const {
  const int64_t length = std::min(sequence.length() + more, sequence.prompt_length() + sequence.params.max_tokens);
  return std::max<int64_t>(0, cache_.pages_needed(length) - cache_.pages_held(sequence.cache_id));
}

void Scheduler::count(Sequence& admitted) {
  admitted.timings->cached_tokens += admitted.computed;
  totals_.prompt_tokens += admitted.prompt_length();
  if (!shares_pages(admitted)) return;
  totals_.prefix_queries += admitted.prompt_length();
  totals_.prefix_hits += admitted.computed;
}

void Scheduler::leave_cache(Sequence& sequence) {
  sequence.failed() ? cache_.discard_sequence(sequence.cache_id) : cache_.remove_sequence(sequence.cache_id);
  sequence.cache_id = -1;
  sequence.computed = 0;
}

EngineStats Scheduler::stats() const {
  EngineStats stats = totals_;
  stats.running = static_cast<int64_t>(running_.size());
  stats.waiting = static_cast<int64_t>(waiting_.size());
  stats.pages = cache_.num_pages();
  stats.pages_in_use = cache_.pages_in_use();
  stats.pages_cached = cache_.pages_cached();
  return stats;
}

void Scheduler::check_integrity() const {
  const auto check = [](bool holds, const Sequence& sequence) {
    if (!holds)
      throw std::logic_error("Scheduler: the state of request " + std::to_string(sequence.id) + " contradicts itself");
  };
  int64_t last = -1;
  for (const Sequence* sequence : running_) {
    check(sequence->id > last && sequence->cache_id >= 0, *sequence);
    const int64_t held = cache_.length(sequence->cache_id);
    check(sequence->in_flight ? sequence->computed < held : sequence->computed == held, *sequence);
    check(sequence->computed < sequence->length() || sequence->constrained, *sequence);
    last = sequence->id;
  }
  for (const Sequence* sequence : waiting_) {
    check(sequence->id > last && sequence->cache_id < 0 && sequence->computed == 0 && !sequence->in_flight, *sequence);
    last = sequence->id;
  }
}

}  // namespace mixtral
