// A cache of the results of a pure function, for one thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <unordered_map>

namespace mixtral::cuda {

// Arguments are kWords words. When the table has kCapacity results, it is cleared; later calls compute them again.
template <typename Value, size_t kWords, size_t kCapacity>
class Memo {
 public:
  using Key = std::array<uint64_t, kWords>;

  // make(Value*) computes the result of `key`; false if there is none, which is not stored.
  template <typename Make>
  bool get(const Key& key, Value* value, const Make& make) {
    if (const auto known = values_.find(key); known != values_.end()) return *value = known->second, true;
    if (!make(value)) return false;
    if (values_.size() == kCapacity) values_.clear();
    values_.emplace(key, *value);
    return true;
  }

 private:
  struct Hash {
    size_t operator()(const Key& key) const {
      uint64_t hash = 0;
      for (const uint64_t word : key) hash = ((hash ^ word) * 0x9E3779B97F4A7C15) ^ (hash >> 29);
      return hash ^ hash >> 32;
    }
  };
  std::unordered_map<Key, Value, Hash> values_;
};

}  // namespace mixtral::cuda
