// JSON from untrusted files: parsed strictly and within limits; every fault is a LoadError.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace mixtral {

// Throws LoadError (file `source`) unless `text` is one JSON object in UTF-8 without duplicate keys, at most 64 levels
// deep, with at most 2^20 values.
nlohmann::json parse_json(const std::string& text, const std::string& source);

// The value as JSON text on one line, cut to 64 bytes, for messages.
std::string shown(const nlohmann::json& value);

}  // namespace mixtral
