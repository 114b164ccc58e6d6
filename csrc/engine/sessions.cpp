#include "sessions.h"

#include <algorithm>
#include <utility>

namespace mixtral {
namespace {

std::optional<Session> take_at(std::list<Session>& sessions, std::list<Session>::iterator place) {
  if (place == sessions.end()) return std::nullopt;
  Session session = std::move(*place);
  sessions.erase(place);
  return session;
}

}  // namespace

std::optional<Session> Sessions::take(const std::string& name) {
  return take_at(idle_, std::find_if(idle_.begin(), idle_.end(), [&](const auto& s) { return s.name == name; }));
}

std::optional<Session> Sessions::take_oldest_but(const std::string& name) {
  return take_at(idle_, std::find_if(idle_.begin(), idle_.end(), [&](const auto& s) { return s.name != name; }));
}

}  // namespace mixtral
