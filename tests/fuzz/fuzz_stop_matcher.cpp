// The input is a text to generate and, part by part, its stop strings. Where the text is cut does not depend on the
// pieces it comes in.
#include <algorithm>
#include <utility>
#include <vector>

#include "fuzz.h"
#include "text/stop_matcher.h"

using namespace mixtral;

namespace {

// Before the stop string that ends first, of several the longest.
std::string expected(const std::string& text, const std::vector<std::string>& stops) {
  std::pair<size_t, size_t> best(text.size() + 1, text.size());  // end, begin
  for (const std::string& stop : stops) {
    const size_t begin = text.find(stop);
    if (begin != std::string::npos) best = std::min(best, {begin + stop.size(), begin});
  }
  return text.substr(0, best.second);
}

}  // namespace

void fuzz(std::string_view input) {
  const std::string text(fuzzing::take_part(input));
  std::vector<std::string> stops;
  while (!input.empty()) stops.emplace_back(fuzzing::take_part(input));
  stops.erase(std::remove(stops.begin(), stops.end(), ""), stops.end());
  for (const size_t step : {1, 2, 7}) {
    StopMatcher matcher(stops);
    std::string shown;
    for (size_t i = 0; i < text.size(); i += step) shown += matcher.push(text.substr(i, step));
    shown += matcher.flush();
    fuzzing::check(shown == expected(text, stops), "the text before the first stop string");
  }
}
