#include "page_pool.h"

#include <map>
#include <stdexcept>
#include <string>
#include <utility>

namespace mixtral {

PagePool::PagePool(int64_t num_pages, int64_t page_size)
    : page_size_(page_size), pages_(static_cast<size_t>(num_pages)) {
  for (int64_t page = 0; page < num_pages; ++page)
    pages_[static_cast<size_t>(page)].place = free_.insert(free_.end(), static_cast<int32_t>(page));
}

// ---- pages

int32_t PagePool::take() {
  const int32_t page = free_.front();
  Page& taken = pages_[static_cast<size_t>(page)];
  forget_name(page);
  used_.splice(used_.end(), free_, taken.place);
  taken.users = 1;
  return page;
}

void PagePool::share(int32_t page) {
  Page& shared = pages_[static_cast<size_t>(page)];
  if (shared.users++ > 0) return;
  used_.splice(used_.end(), free_, shared.place);
  if (shared.name) --cached_;
}

// Pages without a name are the first to be taken, those with one the last.
void PagePool::release(int32_t page) {
  Page& released = pages_[static_cast<size_t>(page)];
  if (--released.users > 0) return;
  free_.splice(released.name ? free_.end() : free_.begin(), used_, released.place);
  if (released.name) ++cached_;
}

// ---- prefixes

size_t PagePool::KeyHash::operator()(const Prefix::Key& key) const {
  uint64_t hash = reinterpret_cast<uintptr_t>(key.shorter);
  for (const int64_t id : key.ids) {  // the finalizer of SplitMix64 (Steele et al., 2014), chained
    hash += static_cast<uint64_t>(id) + 0x9e3779b97f4a7c15;
    hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9;
    hash = (hash ^ (hash >> 27)) * 0x94d049bb133111eb;
    hash ^= hash >> 31;
  }
  return hash;
}

PagePool::Prefix* PagePool::add(Prefix::Key key) {
  const auto [place, is_new] = prefixes_.try_emplace(std::move(key));
  Prefix& prefix = place->second;
  prefix.key = &place->first;
  if (is_new && prefix.key->shorter) hold(prefix.key->shorter);
  hold(&prefix);
  return &prefix;
}

PagePool::Prefix* PagePool::begin(int64_t kind) { return add({nullptr, {kind}}); }

PagePool::Prefix* PagePool::find(Prefix* prefix, const int64_t* ids) const {
  const auto found = prefixes_.find({prefix, {ids, ids + page_size_}});
  return found == prefixes_.end() ? nullptr : const_cast<Prefix*>(&found->second);
}

PagePool::Prefix* PagePool::extend(Prefix* prefix, const int64_t* ids) {
  Prefix* const longer = add({prefix, {ids, ids + page_size_}});
  drop(prefix);
  return longer;
}

void PagePool::hold(Prefix* prefix) { ++prefix->holds; }

void PagePool::drop(Prefix* prefix) {
  while (prefix && --prefix->holds == 0) {
    Prefix* const shorter = prefix->key->shorter;
    prefixes_.erase(prefixes_.find(*prefix->key));
    prefix = shorter;
  }
}

void PagePool::name(int32_t page, Prefix* prefix) {
  pages_[static_cast<size_t>(page)].name = prefix;
  prefix->page = page;
  hold(prefix);
}

void PagePool::forget_name(int32_t page) {
  Page& named = pages_[static_cast<size_t>(page)];
  if (!named.name) return;
  if (named.users == 0) --cached_;
  named.name->page = -1;
  drop(std::exchange(named.name, nullptr));
}

// ---- integrity

void PagePool::check_integrity(const std::vector<int64_t>& users, const std::vector<Prefix*>& held) const {
  const auto check = [](bool holds, const std::string& what) {
    if (!holds) throw std::logic_error("PagePool: " + what);
  };
  check(used_.size() + free_.size() == pages_.size(), "a page is in neither list");
  int64_t cached = 0;
  std::map<const Prefix*, int64_t> holds;
  for (size_t i = 0; i < pages_.size(); ++i) {
    const Page& page = pages_[i];
    const std::string name = "page " + std::to_string(i);
    check(page.users == users[i], name + " counts " + std::to_string(page.users) + " users, but " +
                                      std::to_string(users[i]) + " sequences hold it");
    check(*page.place == static_cast<int32_t>(i), name + " has another's place");
    check(!page.name || page.name->page == static_cast<int32_t>(i), name + " has another's name");
    if (page.name) ++holds[page.name];
    if (page.name && page.users == 0) ++cached;
  }
  for (const int32_t page : free_) check(users[static_cast<size_t>(page)] == 0, "a free page is in use");
  check(cached == cached_, "the count of cached pages is wrong");
  for (Prefix* const prefix : held) ++holds[prefix];
  for (const auto& [key, prefix] : prefixes_)
    if (key.shorter) ++holds[key.shorter];
  for (const auto& [key, prefix] : prefixes_) {
    check(prefix.holds == holds[&prefix] && prefix.holds > 0, "a prefix is held by nobody, or not by all that count");
    check(prefix.page < 0 || pages_[static_cast<size_t>(prefix.page)].name == &prefix, "a prefix has another's page");
  }
}

}  // namespace mixtral
