// Values as Python's own: their text, items and attributes; and the limits of one rendering.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "value.h"

namespace mixtral::jinja {

// Throws TemplateError when the work of one rendering is more than any chat needs.
class Budget {
 public:
  static constexpr size_t kMaxBytes = size_t{1} << 24;  // of one text

  void spend(size_t work, int line);
  // A text or list of this many bytes or items is about to be made.
  void make(size_t size, int line);

 private:
  size_t spent_ = 0;
};

// Where a call stands, for its errors and its work.
struct Place {
  int line;
  Budget& budget;

  [[noreturn]] void fail(const std::string& reason) const;
  [[noreturn]] void unsupported(const std::string& what) const;
};

// str(value).
std::string to_text(const Value& value, const Place& place);
// What a loop goes over: items, keys or characters.
List to_list(const Value& value, const Place& place);
// A list of these texts.
List texts(const std::vector<std::string_view>& parts, const Place& place);
// A dictionary's "items", "keys" or "values".
List entries(const Dict& dict, const std::string& what);
// value.name and value["name"], but for methods.
Value attribute(const Value& value, const std::string& name, const Place& place);
Value item(const Value& value, const Value& key, const Place& place);
bool contains(const Value& container, const Value& value, const Place& place);

// Throws where a list or a namespace may not hold the value: namespaces in each other, or lists nested without end.
void check_held(const Value& value, const Place& place, int depth = 0);

}  // namespace mixtral::jinja
