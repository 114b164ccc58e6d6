// Finds stop strings in streamed text.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace mixtral {

// Holds back text that may be the beginning of a stop string. Where the text is cut does not depend on the pieces it
// came in: the stop string that ends first wins, of several the longest.
class StopMatcher {
 public:
  explicit StopMatcher(std::vector<std::string> stop) : stop_(std::move(stop)) {}
  // Returns the text that is safe to show. After a match, stopped() is true and push() returns nothing more.
  std::string push(const std::string& text);
  std::string flush();  // the text held back
  bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> stop_;
  std::string held_;
  bool stopped_ = false;
};

}  // namespace mixtral
