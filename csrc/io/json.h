// JSON from untrusted files: parsed strictly and within limits; every fault is a LoadError.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace mixtral {

// Throws LoadError (file `source`) unless `text` is one JSON object in UTF-8 without duplicate keys, at most 64 levels
// deep, with at most 2^20 values.
nlohmann::json parse_json(const std::string& text, const std::string& source);

// For files whose values are too many to build them all: a handler of the parser's events, which throws LoadError for
// invalid JSON. Limits and duplicate keys are the handler's matter.
class JsonEvents : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit JsonEvents(const std::string& source) : source_(source) {}
  bool parse_error(size_t position, const std::string& token, const nlohmann::json::exception& error) override;

 private:
  const std::string& source_;
};

// Throws LoadError (file `source`) unless `text` is one JSON object in UTF-8.
void read_json_events(const std::string& text, const std::string& source, JsonEvents& events);

// The value as JSON text on one line, cut to 64 bytes, for messages.
std::string shown(const nlohmann::json& value);

}  // namespace mixtral
