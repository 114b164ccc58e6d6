#include "stop_matcher.h"

#include <algorithm>

namespace mixtral {

std::string StopMatcher::push(const std::string& text) {
  if (stopped_) return "";
  held_ += text;
  size_t begin = std::string::npos, end = std::string::npos;  // of the match
  size_t safe = held_.size();  // before the longest end of the text that begins a stop string
  for (const std::string& stop : stop_) {
    const size_t found = held_.find(stop);
    if (found != std::string::npos && std::make_pair(found + stop.size(), found) < std::make_pair(end, begin)) {
      begin = found;
      end = found + stop.size();
    }
    for (size_t i = held_.size() - std::min(held_.size(), stop.size() - 1); i < safe; ++i) {
      if (stop.compare(0, held_.size() - i, held_, i) == 0) safe = i;
    }
  }
  stopped_ = begin != std::string::npos;
  std::string shown = held_.substr(0, stopped_ ? begin : safe);
  held_ = stopped_ ? "" : held_.substr(safe);
  return shown;
}

std::string StopMatcher::flush() {
  std::string rest;
  rest.swap(held_);
  return rest;
}

}  // namespace mixtral
