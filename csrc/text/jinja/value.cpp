#include "value.h"

namespace mixtral::jinja {

bool Value::truth() const {
  if (is_number()) return number() != 0;
  if (string()) return !string()->empty();
  if (list()) return !list()->empty();
  if (dict()) return !dict()->empty();
  return !is_undefined() && !is_none();
}

const char* Value::type_name() const {
  static constexpr const char* kNames[] = {"an undefined value", "none",        "a truth value",
                                           "a number",           "a string",    "a list",
                                           "a dictionary",       "a namespace", "the variable loop"};
  return kNames[index()];
}

bool equal(const Value& a, const Value& b) {
  if (a.is_number() && b.is_number()) return a.number() == b.number();
  if (a.index() != b.index()) return false;
  if (a.string()) return *a.string() == *b.string();
  if (a.list()) {
    bool same = a.list()->size() == b.list()->size();
    for (size_t i = 0; same && i < a.list()->size(); ++i) same = equal((*a.list())[i], (*b.list())[i]);
    return same;
  }
  if (a.dict()) {
    bool same = a.dict()->size() == b.dict()->size();
    for (const auto& [key, value] : *a.dict()) {
      const Value* other = find(*b.dict(), key);
      same = same && other && equal(value, *other);
    }
    return same;
  }
  if (a.is<std::shared_ptr<Namespace>>()) {
    return std::get<std::shared_ptr<Namespace>>(a) == std::get<std::shared_ptr<Namespace>>(b);
  }
  return a.is_undefined() || a.is_none();
}

const Value* find(const Dict& dict, const std::string& key) {
  for (const auto& [name, value] : dict) {
    if (name == key) return &value;
  }
  return nullptr;
}

}  // namespace mixtral::jinja
