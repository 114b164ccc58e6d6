#include "scheduler.h"

#include <algorithm>

namespace mixtral {

void Scheduler::remove(const Sequence& sequence) {
  waiting_.erase(std::remove(waiting_.begin(), waiting_.end(), &sequence), waiting_.end());
  running_.erase(std::remove(running_.begin(), running_.end(), &sequence), running_.end());
}

Sequence* Scheduler::next() const { return waiting_.empty() || free_seats() == 0 ? nullptr : waiting_.front(); }

bool Scheduler::admit(int64_t pages) {
  Sequence* const sequence = next();
  if (!sequence || reserved_pages() + sequence->max_pages > pages) return false;
  running_.push_back(sequence);
  waiting_.pop_front();
  return true;
}

std::vector<Scheduler::Chunk> Scheduler::plan() const {
  std::vector<Chunk> chunks;
  int64_t budget = options_.token_budget;
  for (Sequence* sequence : running_) {
    const int64_t tokens = std::min({sequence->length() - sequence->computed, options_.chunk_size, budget});
    if (budget == 0) break;
    if (tokens == 0) continue;  // it waits for the mask of its next token
    chunks.push_back({sequence, tokens});
    budget -= tokens;
  }
  return chunks;
}

int64_t Scheduler::reserved_pages() const {
  int64_t pages = 0;
  for (const Sequence* sequence : running_) pages += sequence->max_pages;
  return pages;
}

int64_t Scheduler::wanted_pages() const {
  int64_t pages = reserved_pages();
  const size_t count = std::min(waiting_.size(), free_seats());
  for (size_t i = 0; i < count; ++i) pages += waiting_[i]->max_pages;
  return pages;
}

}  // namespace mixtral
