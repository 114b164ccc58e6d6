// The pages of a key/value cache: which are in use, and which tokens the full ones hold.
//
// A full page never changes, and has a name: the prefix, all tokens from the beginning of a sequence to the end of the
// page. Sequences that begin alike share such pages. A page that nobody uses any more keeps its name until it is taken
// for something else, the least recently used one first. No torch in here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <unordered_map>
#include <vector>

namespace mixtral {

class PagePool {
 public:
  // Equal prefixes are one object: found by a hash over the prefix without its last page and the tokens of that page,
  // and verified by comparing both. So two prefixes are equal when their addresses are.
  struct Prefix {
    struct Key {
      Prefix* shorter;           // by a page; null for the empty prefix
      std::vector<int64_t> ids;  // of the last page; {kind} for the empty prefix
      bool operator==(const Key& other) const { return shorter == other.shorter && ids == other.ids; }
    };
    const Key* key = nullptr;  // in prefixes_
    int32_t page = -1;         // that has this name; -1: none
    int64_t holds = 0;         // of callers, of the page, and of longer prefixes
  };

  PagePool(int64_t num_pages, int64_t page_size);

  int32_t take();              // a page for one user; available() must not be 0
  void share(int32_t page);    // one more user
  void release(int32_t page);  // one user less
  int64_t users(int32_t page) const { return pages_[static_cast<size_t>(page)].users; }

  int64_t available() const { return static_cast<int64_t>(free_.size()); }  // pages that take() may give
  int64_t cached() const { return cached_; }                                // of these, those with a name

  // The empty prefix. Keys and values of different kinds are never shared: they depend on more than the tokens.
  Prefix* begin(int64_t kind);
  // The prefix and the page_size tokens behind it; null if no such prefix is known.
  Prefix* find(Prefix* prefix, const int64_t* ids) const;
  // The same, made when unknown. The caller's hold moves from the shorter prefix to the longer one.
  Prefix* extend(Prefix* prefix, const int64_t* ids);
  void hold(Prefix* prefix);
  void drop(Prefix* prefix);  // a prefix is forgotten when nobody holds it, no page has its name, and none extends it

  void name(int32_t page, Prefix* prefix);  // neither may have another yet
  void forget_name(int32_t page);           // if it has one

  // Throws std::logic_error unless the pages and prefixes are what `users` of each page and the `held` prefixes of the
  // sequences say.
  void check_integrity(const std::vector<int64_t>& users, const std::vector<Prefix*>& held) const;

 private:
  struct Page {
    int64_t users = 0;
    Prefix* name = nullptr;
    std::list<int32_t>::iterator place;  // in used_ or free_
  };
  struct KeyHash {
    size_t operator()(const Prefix::Key& key) const;
  };

  Prefix* add(Prefix::Key key);

  int64_t page_size_, cached_ = 0;
  std::vector<Page> pages_;
  std::list<int32_t> used_, free_;  // free_: taken from the front
  std::unordered_map<Prefix::Key, Prefix, KeyHash> prefixes_;
};

}  // namespace mixtral
