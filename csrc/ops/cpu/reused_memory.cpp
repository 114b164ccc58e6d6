#include "reused_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <list>
#include <mutex>

namespace mixtral::cpu {
namespace {

struct Block {
  void* data;
  size_t bytes;
};

// Never destroyed: tensors may be freed after everything else, when the process ends.
struct Blocks {
  std::mutex mutex;
  std::list<Block> idle;  // the one that was returned last comes last
  MemoryInUse bytes{0, 0};
};

Blocks& blocks() {
  static Blocks& all = *new Blocks;
  return all;
}

void* map(size_t bytes) {
  void* const data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return data == MAP_FAILED ? nullptr : data;
}

void unmap_first(Blocks& all) {
  munmap(all.idle.front().data, all.idle.front().bytes);
  all.bytes.idle -= all.idle.front().bytes;
  all.idle.pop_front();
}

}  // namespace

void* take_memory(size_t bytes) {
  Blocks& all = blocks();
  const std::lock_guard lock(all.mutex);
  const auto found =
      std::find_if(all.idle.rbegin(), all.idle.rend(), [bytes](const Block& block) { return block.bytes == bytes; });
  void* data = nullptr;
  if (found != all.idle.rend()) {
    data = found->data;
    all.idle.erase(std::next(found).base());
    all.bytes.idle -= bytes;
  } else {
    // Sizes that nobody asks for any more: what is idle stays below what is taken.
    while (!all.idle.empty() && all.bytes.idle > all.bytes.taken) unmap_first(all);
    data = map(bytes);
    if (!data) return nullptr;
  }
  all.bytes.taken += bytes;
  return data;
}

void return_memory(void* data, size_t bytes) {
#ifdef MADV_FREE
  madvise(data, bytes, MADV_FREE);
#endif
  Blocks& all = blocks();
  const std::lock_guard lock(all.mutex);
  all.idle.push_back({data, bytes});
  all.bytes.taken -= bytes;
  all.bytes.idle += bytes;
}

MemoryInUse memory_in_use() {
  Blocks& all = blocks();
  const std::lock_guard lock(all.mutex);
  return all.bytes;
}

}  // namespace mixtral::cpu
