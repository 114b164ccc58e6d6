// The conversations whose keys and values stay in the cache between two requests.
#pragma once

#include <cstdint>
#include <list>
#include <optional>
#include <string>
#include <vector>

namespace mixtral {

struct Session {
  std::string name;
  int64_t cache_id;          // of its keys and values
  std::vector<int64_t> ids;  // the tokens they belong to
};

// Sessions that no running request uses, oldest first.
class Sessions {
 public:
  void add(Session session) { idle_.push_back(std::move(session)); }
  std::optional<Session> take(const std::string& name);
  // The one that has been idle for longest, but for that of this name.
  std::optional<Session> take_oldest_but(const std::string& name);
  const std::list<Session>& idle() const { return idle_; }

 private:
  std::list<Session> idle_;
};

}  // namespace mixtral
