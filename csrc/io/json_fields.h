// The fields of a JSON configuration file, each with its type checked.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "json.h"
#include "load_error.h"

namespace mixtral {

// One JSON object of a configuration file, read key by key. A key whose value is null counts as absent.
class JsonFields {
 public:
  JsonFields(const nlohmann::json& object, const std::string& source) : object_(object), source_(source) {}

  [[noreturn]] void fail(const std::string& key, const std::string& reason) const {
    throw LoadError(source_, key, reason);
  }

  bool contains(const char* key) const { return object_.contains(key); }

  const nlohmann::json* find(const char* key) const {
    const auto found = object_.find(key);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }

  const nlohmann::json& at(const char* key) const {
    const nlohmann::json* value = find(key);
    if (!value) fail(key, contains(key) ? "must have a value, got null" : "is missing");
    return *value;
  }

  int64_t as_integer(const char* key, const nlohmann::json& value) const {
    // A number above 2^63 would wrap around in get<int64_t>.
    const bool fits =
        value.is_number_integer() && !(value.is_number_unsigned() && value.get<uint64_t>() > uint64_t{INT64_MAX});
    if (!fits) fail(key, "must be an integer, got " + shown(value));
    return value;
  }

  int64_t integer(const char* key) const { return as_integer(key, at(key)); }
  int64_t integer(const char* key, int64_t absent) const { return find(key) ? integer(key) : absent; }

  double number(const char* key) const {
    const nlohmann::json& value = at(key);
    if (!value.is_number()) fail(key, "must be a number, got " + shown(value));
    return value;
  }

  bool boolean(const char* key, bool absent) const {
    const nlohmann::json* value = find(key);
    if (value && !value->is_boolean()) fail(key, "must be true or false, got " + shown(*value));
    return value ? value->get<bool>() : absent;
  }

  std::string string(const char* key) const {
    const nlohmann::json& value = at(key);
    if (!value.is_string()) fail(key, "must be a string, got " + shown(value));
    return value;
  }

  JsonFields object(const char* key) const {
    const nlohmann::json& value = at(key);
    if (!value.is_object()) fail(key, "must be an object, got " + shown(value));
    return JsonFields(value, source_);
  }

  // Features this model does not have: computing without them would give wrong numbers in silence.
  void reject(std::initializer_list<const char*> keys) const {
    for (const char* key : keys) {
      const nlohmann::json* value = find(key);
      if (value && *value != false) fail(key, "is not supported, got " + shown(*value));
    }
  }

 private:
  const nlohmann::json& object_;
  const std::string& source_;
};

}  // namespace mixtral
