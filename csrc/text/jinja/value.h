// A value of a template's expression.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace mixtral::jinja {

struct Value;
using List = std::vector<Value>;
using Dict = std::vector<std::pair<std::string, Value>>;  // in the order of insertion

struct Undefined {};
struct None {};
struct Namespace {
  std::map<std::string, Value> fields;
};
struct Loop {  // the variable `loop`
  std::shared_ptr<const List> items;
  size_t index;  // from 0
};

// Copies share what they hold. Only a namespace can change.
struct Value
    : std::variant<Undefined, None, bool, int64_t, std::shared_ptr<const std::string>, std::shared_ptr<const List>,
                   std::shared_ptr<const Dict>, std::shared_ptr<Namespace>, Loop> {
  using variant::variant;
  Value(std::string text) : variant(std::make_shared<const std::string>(std::move(text))) {}
  Value(const char* text) : Value(std::string(text)) {}
  Value(List items) : variant(std::make_shared<const List>(std::move(items))) {}
  Value(Dict entries) : variant(std::make_shared<const Dict>(std::move(entries))) {}

  template <typename T>
  bool is() const {
    return std::holds_alternative<T>(*this);
  }
  bool is_undefined() const { return is<Undefined>(); }
  bool is_none() const { return is<None>(); }
  const std::string* string() const { return get<std::string>(); }
  const List* list() const { return get<List>(); }
  const Dict* dict() const { return get<Dict>(); }
  // True and false count as 1 and 0, as in Python.
  bool is_number() const { return is<bool>() || is<int64_t>(); }
  int64_t number() const { return is<bool>() ? std::get<bool>(*this) : std::get<int64_t>(*this); }

  bool truth() const;
  // "a string", for messages.
  const char* type_name() const;

 private:
  template <typename T>
  const T* get() const {
    const auto* held = std::get_if<std::shared_ptr<const T>>(this);
    return held ? held->get() : nullptr;
  }
};

bool equal(const Value& a, const Value& b);
const Value* find(const Dict& dict, const std::string& key);

}  // namespace mixtral::jinja
