// Decides which requests run, how many tokens of each the next forward pass computes, and with which pages of the
// key/value cache. First come, first served.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "sequence.h"

namespace mixtral {

class RollingKVCache;

// A request takes pages as it grows. When there are none left, the newest of the running requests gives all of its own
// back and waits, first in line, to be computed again; full pages stay cached for that until they are taken. The oldest
// request always gets its pages: each request fits the pool alone. So it ends, and no request waits for ever.
//
// Of several passes in flight each gets its share of the requests. A request in flight is not planned, and keeps its
// pages: whoever needs those waits, and everybody newer with it, until the pass is collected.
class Scheduler {
 public:
  struct Options {
    int64_t chunk_size;    // tokens of one sequence per forward pass
    int64_t token_budget;  // tokens of all sequences per forward pass
    int64_t max_batch;     // sequences running at a time
    bool prefix_cache = true;
    // Admission leaves pages for this many new tokens of each running request, or for as many as it may generate.
    // Without a limit, requests with a large max_tokens that they hardly ever need would keep others waiting; with
    // less, more requests would be preempted, and computed again.
    int64_t headroom = 256;
    // Tokens of one sequence in a pass in which others decode, and of all that do not decode twice as many: the longer
    // such a pass takes, the longer those wait. 0: as in other passes.
    int64_t mixed_chunk_size = 0;
    int64_t depth = 1;  // passes in flight
  };
  // The next `tokens` tokens of `sequence`.
  struct Chunk {
    Sequence* sequence;
    int64_t tokens;
  };

  Scheduler(Options options, RollingKVCache& cache) : options_(options), cache_(cache) {}

  void add(Sequence& sequence) { waiting_.push_back(&sequence); }
  // Waiting or running; its pages go back to the pool.
  void remove(Sequence& sequence);

  // The next forward pass: more of a prompt, or the newest token, of as many requests as the budget and the share of
  // the pass allow, with pages for these tokens. Those that run come first, the oldest of them at the head; then those
  // that wait are admitted.
  std::vector<Chunk> plan();

  EngineStats stats() const;  // but for the tokens generated and computed

  // Throws std::logic_error when a sequence and its place in the cache do not agree.
  void check_integrity() const;

 private:
  // What is left of a pass.
  struct Budget {
    int64_t tokens, prefill_tokens, chunk_size;
  };
  Budget budget() const;
  int64_t runnable() const;
  size_t share_of_pass(int64_t sequences) const;
  bool add_chunk(Sequence& sequence, Budget& budget, std::vector<Chunk>& chunks);
  void preempt(Sequence& sequence);
  bool admit();
  bool others_compute_its_prefix(const Sequence& next) const;
  int64_t pages_to_take(const Sequence& sequence, int64_t more) const;
  // The keys of a replayed sequence depend on its trace.
  bool shares_pages(const Sequence& sequence) const { return options_.prefix_cache && !sequence.replay; }
  void count(Sequence& admitted);
  void leave_cache(Sequence& sequence);

  Options options_;
  RollingKVCache& cache_;
  std::deque<Sequence*> waiting_;   // in the order of arrival
  std::vector<Sequence*> running_;  // in the order of arrival, all of them before those that wait
  EngineStats totals_;
};

}  // namespace mixtral
