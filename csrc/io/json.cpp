#include "json.h"

#include <set>
#include <vector>

#include "load_error.h"

namespace mixtral {
namespace {

using nlohmann::json;

// nlohmann keeps the last of two equal keys in silence, and bounds neither depth nor size: this pass looks at the
// events of the parser before any value is built. (Its parser with a callback is quadratic in the number of nested
// objects.)
class Checker : public JsonEvents {
 public:
  explicit Checker(const std::string& source) : JsonEvents(source), source_(source) {}

  bool null() override { return value(); }
  bool boolean(bool) override { return value(); }
  bool number_integer(int64_t) override { return value(); }
  bool number_unsigned(uint64_t) override { return value(); }
  bool number_float(double, const std::string&) override { return value(); }
  bool string(std::string&) override { return value(); }
  bool binary(json::binary_t&) override { return value(); }
  bool start_object(size_t) override { return open(); }
  bool start_array(size_t) override { return open(); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool key(std::string& key) override {
    if (!keys_.back().insert(key).second) throw LoadError(source_, key, "key occurs twice");
    return true;
  }

 private:
  bool value() {
    constexpr size_t kMaxValues = size_t{1} << 20;
    if (++values_ > kMaxValues) {
      throw LoadError(source_, "", "JSON holds more than " + std::to_string(kMaxValues) + " values");
    }
    return true;
  }
  bool open() {
    constexpr size_t kMaxDepth = 64;
    keys_.emplace_back();
    if (keys_.size() > kMaxDepth) {
      throw LoadError(source_, "", "JSON is nested deeper than " + std::to_string(kMaxDepth) + " levels");
    }
    return value();
  }
  bool close() {
    keys_.pop_back();
    return true;
  }

  const std::string& source_;
  std::vector<std::set<std::string>> keys_;  // of the objects and arrays being read, outermost first
  size_t values_ = 0;
};

}  // namespace

bool JsonEvents::parse_error(size_t position, const std::string&, const json::exception& error) {
  const bool range = dynamic_cast<const json::out_of_range*>(&error) != nullptr;
  throw LoadError(source_, "",
                  "is not valid JSON: " + std::string(range ? "number out of range" : "syntax error") + " at byte " +
                      std::to_string(position));
}

void read_json_events(const std::string& text, const std::string& source, JsonEvents& events) {
  // The library skips a byte-order mark and takes NUL for the end; JSON allows neither.
  const size_t begin = text.find_first_not_of(" \t\r\n");
  if (begin == std::string::npos || text[begin] != '{' || text.find('\0') != std::string::npos) {
    throw LoadError(source, "", "is not a JSON object");
  }
  json::sax_parse(text, &events);
}

json parse_json(const std::string& text, const std::string& source) {
  Checker checker(source);
  read_json_events(text, source, checker);
  return json::parse(text);
}

std::string shown(const json& value) {
  constexpr size_t kMaxBytes = 64;
  // ASCII only: a cut never splits a character.
  const std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
  return text.size() > kMaxBytes ? text.substr(0, kMaxBytes) + "..." : text;
}

}  // namespace mixtral
