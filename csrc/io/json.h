// JSON from untrusted files: parsed strictly and within limits; every fault is a LoadError.
#pragma once

#include <functional>
#include <nlohmann/json.hpp>
#include <string>

namespace mixtral {

// Throws LoadError (file `source`) unless `text` is one JSON object in UTF-8 without duplicate keys, at most 64 levels
// deep, with at most 2^17 values and no 1 MiB without a quotation mark.
nlohmann::json parse_json(const std::string& text, const std::string& source);

// The same for an object of many values, which are never in memory together: `member` gets each key and its value, in
// the file's order, and finds the keys that occur twice. The limits hold for each value.
using JsonMember = std::function<void(const std::string& key, const nlohmann::json& value)>;
void read_json_members(const std::string& text, const std::string& source, const JsonMember& member);

// For files with values that are to become no JSON at all: a handler of the parser's events, which throws LoadError for
// invalid JSON. Limits and duplicate keys are the handler's matter.
class JsonEvents : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit JsonEvents(const std::string& source) : source_(source) {}
  bool parse_error(size_t position, const std::string& token, const nlohmann::json::exception& error) override;

 private:
  const std::string& source_;
};

// Throws LoadError (file `source`) unless `text` is one JSON object in UTF-8 without 1 MiB between two quotation marks.
void read_json_events(const std::string& text, const std::string& source, JsonEvents& events);

// The value as JSON text in ASCII, cut after about 64 bytes, for messages.
std::string shown(const nlohmann::json& value);

}  // namespace mixtral
