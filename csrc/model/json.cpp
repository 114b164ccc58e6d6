#include "json.h"

#include <set>
#include <vector>

#include "load_error.h"

namespace mixtral {
namespace {

using nlohmann::json;

// nlohmann keeps the last of two equal keys in silence, and bounds neither depth nor size: this watches it parse.
class Watcher {
 public:
  explicit Watcher(const std::string& source) : source_(source) {}

  void see(int depth, json::parse_event_t event, const json& parsed) {
    if (depth > kMaxDepth) throw LoadError(source_, "", "JSON is nested deeper than " + std::to_string(kMaxDepth));
    if (++values_ > kMaxValues)
      throw LoadError(source_, "", "JSON holds more than " + std::to_string(kMaxValues) + " values");
    if (event == json::parse_event_t::object_start) keys_.emplace_back();
    if (event == json::parse_event_t::object_end) keys_.pop_back();
    if (event == json::parse_event_t::key) {
      const std::string& key = parsed.get_ref<const std::string&>();
      if (!keys_.back().insert(key).second) throw LoadError(source_, key, "key occurs twice");
    }
  }

 private:
  static constexpr int kMaxDepth = 64;
  static constexpr size_t kMaxValues = size_t{1} << 20;
  const std::string& source_;
  std::vector<std::set<std::string>> keys_;  // of the objects being parsed, outermost first
  size_t values_ = 0;
};

}  // namespace

json parse_json(const std::string& text, const std::string& source) {
  // The library skips a byte-order mark and takes NUL for the end; JSON allows neither.
  const size_t begin = text.find_first_not_of(" \t\r\n");
  if (begin == std::string::npos || text[begin] != '{' || text.find('\0') != std::string::npos) {
    throw LoadError(source, "", "is not a JSON object");
  }
  Watcher watcher(source);
  try {
    return json::parse(text, [&](int depth, json::parse_event_t event, json& parsed) {
      watcher.see(depth, event, parsed);
      return true;
    });
  } catch (const json::parse_error& error) {
    throw LoadError(source, "", "is not valid JSON, see byte " + std::to_string(error.byte));
  } catch (const json::exception&) {
    throw LoadError(source, "", "is not valid JSON: a number is out of range");
  }
}

std::string shown(const json& value) {
  constexpr size_t kMaxBytes = 64;
  // ASCII only: a cut never splits a character.
  const std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
  return text.size() > kMaxBytes ? text.substr(0, kMaxBytes) + "..." : text;
}

}  // namespace mixtral
