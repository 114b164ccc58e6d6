#include "functions.h"

#include <algorithm>
#include <ctime>
#include <optional>
#include <set>

#include "error.h"
#include "python_text.h"

namespace mixtral::jinja {
namespace {

const std::string& text_argument(const Arguments& arguments, size_t index, const Place& place) {
  if (!arguments.named.empty() || index >= arguments.values.size() || !arguments.values[index].string()) {
    place.unsupported("this call, whose argument " + std::to_string(index + 1) + " is no string,");
  }
  return *arguments.values[index].string();
}

void expect_count(const Arguments& arguments, size_t least, size_t most, const Place& place) {
  const size_t count = arguments.values.size();
  if (!arguments.named.empty() || count < least || count > most) place.unsupported("a call with these arguments");
}

bool is_ascii(const std::string& text) {
  return std::all_of(text.begin(), text.end(), [](unsigned char c) { return c < 0x80; });
}
bool is_upper(char c) { return 'A' <= c && c <= 'Z'; }
bool is_lower(char c) { return 'a' <= c && c <= 'z'; }
char to_upper(char c) { return is_lower(c) ? static_cast<char>(c - 32) : c; }
char to_lower(char c) { return is_upper(c) ? static_cast<char>(c + 32) : c; }

// upper, lower, capitalize and title; other alphabets have rules of their own.
std::string with_case(const std::string& name, std::string text, const Place& place) {
  if (!is_ascii(text)) place.unsupported(name + " of text that is not ASCII");
  bool letter_before = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    const bool starts = name == "title" ? !letter_before : i == 0;
    letter_before = is_upper(c) || is_lower(c);
    text[i] = name == "upper" || (name != "lower" && starts) ? to_upper(c) : to_lower(c);
  }
  return text;
}

std::string stripped(const std::string& name, const std::string& text, const Arguments& arguments, const Place& place) {
  expect_count(arguments, 0, 1, place);
  std::optional<std::string_view> of;
  if (!arguments.values.empty() && !arguments.values[0].is_none()) of = text_argument(arguments, 0, place);
  if (of && !is_ascii(std::string(*of))) place.unsupported("stripping characters that are not ASCII");
  return std::string(strip(text, name != "rstrip", name != "lstrip", of));
}

std::string replaced(const std::string& text, const Arguments& arguments, const Place& place) {
  expect_count(arguments, 2, 2, place);
  const std::string &from = text_argument(arguments, 0, place), &to = text_argument(arguments, 1, place);
  if (from.empty()) place.unsupported("replacing an empty string");
  const std::vector<std::string_view> parts = split(text, from, -1);
  place.budget.make(text.size() + (parts.size() - 1) * to.size(), place.line);
  std::string result;
  for (size_t i = 0; i < parts.size(); ++i) result.append(i == 0 ? "" : to).append(parts[i]);
  return result;
}

std::string joined(const List& items, const std::string& separator, const Place& place) {
  std::string result;
  for (size_t i = 0; i < items.size(); ++i) {
    const std::string text = to_text(items[i], place);
    place.budget.make(result.size() + separator.size() + text.size(), place.line);
    result.append(i == 0 ? "" : separator).append(text);
  }
  return result;
}

Value defaulted(const Value& value, const Arguments& arguments, const Place& place) {
  Arguments given = arguments;
  for (auto& [name, argument] : given.named) {
    if (name == "boolean" && given.values.size() == 1) given.values.push_back(argument);
  }
  if (!arguments.named.empty() && given.values.size() == arguments.values.size()) {
    place.unsupported("default() with these arguments");
  }
  given.named.clear();
  expect_count(given, 0, 2, place);
  const bool falsy = given.values.size() == 2 && given.values[1].truth() && !value.truth();
  if (!value.is_undefined() && !falsy) return value;
  return given.values.empty() ? Value("") : given.values[0];
}

// selectattr(name), selectattr(name, test, argument) and their opposites.
Value selected(bool keep, const Value& value, const Arguments& arguments, const Place& place) {
  expect_count(arguments, 1, 3, place);
  const std::string& name = text_argument(arguments, 0, place);
  if (name.find('.') != name.npos) place.unsupported("selectattr of an attribute's attribute");
  List list;
  for (const Value& each : to_list(value, place)) {
    const Value field = item(each, name, place);
    const bool passes =
        arguments.values.size() == 1
            ? field.truth()
            : call_test(text_argument(arguments, 1, place), field,
                        std::vector<Value>(arguments.values.begin() + 2, arguments.values.end()), place);
    if (passes == keep) list.push_back(each);
  }
  return list;
}

Value mapped(const Value& value, const Arguments& arguments, const Place& place) {
  const bool fits = arguments.values.empty() && arguments.named.size() == 1 &&
                    arguments.named[0].first == "attribute" && arguments.named[0].second.string();
  if (!fits || arguments.named[0].second.string()->find('.') != std::string::npos) {
    place.unsupported("map() but for map(attribute=\"name\")");
  }
  List list;
  for (const Value& each : to_list(value, place)) list.push_back(item(each, arguments.named[0].second, place));
  return list;
}

Value length(const Value& value, const Place& place) {
  if (value.is_number() || value.is_none()) place.fail(std::string(value.type_name()) + " has no length");
  return static_cast<int64_t>(to_list(value, place).size());
}

}  // namespace

Value call_filter(const std::string& name, const Value& value, const Arguments& arguments, const Place& place) {
  if (name == "default" || name == "d") return defaulted(value, arguments, place);
  if (name == "trim") return stripped(name, to_text(value, place), arguments, place);
  if (name == "replace") return replaced(to_text(value, place), arguments, place);
  if (name == "selectattr" || name == "rejectattr") return selected(name == "selectattr", value, arguments, place);
  if (name == "map") return mapped(value, arguments, place);
  if (name == "join") {
    expect_count(arguments, 0, 1, place);
    return joined(to_list(value, place), arguments.values.empty() ? "" : text_argument(arguments, 0, place), place);
  }
  expect_count(arguments, 0, 0, place);
  if (name == "length" || name == "count") return length(value, place);
  if (name == "upper" || name == "lower" || name == "capitalize") return with_case(name, to_text(value, place), place);
  if (name == "string") return to_text(value, place);
  if (name == "list") return to_list(value, place);
  if (name == "first" || name == "last") {
    const List items = to_list(value, place);
    return items.empty() ? Value() : name == "first" ? items.front() : items.back();
  }
  if (name == "items" && value.dict()) return entries(*value.dict(), name);
  place.unsupported("the filter " + name);
}

bool call_test(const std::string& name, const Value& value, const std::vector<Value>& arguments, const Place& place) {
  if (arguments.size() == 1) {
    if (name == "equalto" || name == "eq" || name == "==") return equal(value, arguments[0]);
    if (name == "ne" || name == "!=") return !equal(value, arguments[0]);
    if (name == "in") return contains(arguments[0], value, place);
  }
  if (!arguments.empty()) place.unsupported("the test " + name + " with these arguments");
  if (name == "defined") return !value.is_undefined();
  if (name == "undefined") return value.is_undefined();
  if (name == "none") return value.is_none();
  if (name == "boolean") return value.is<bool>();
  if (name == "true") return value.is<bool>() && value.truth();
  if (name == "false") return value.is<bool>() && !value.truth();
  if (name == "string") return value.string();
  if (name == "number") return value.is_number();
  if (name == "integer") return value.is<int64_t>();
  if (name == "mapping") return value.dict();
  if (name == "iterable" || name == "sequence") {
    return value.string() || value.list() || value.dict() || value.is_undefined();
  }
  if ((name == "odd" || name == "even") && value.is_number()) return (value.number() % 2 != 0) == (name == "odd");
  place.unsupported("the test " + name);
}

Value call_method(const Value& value, const std::string& name, const Arguments& arguments, const Place& place) {
  if (value.dict()) {
    const Dict& dict = *value.dict();
    if (name == "get") {
      expect_count(arguments, 1, 2, place);
      const Value* found = find(dict, text_argument(arguments, 0, place));
      return found ? *found : arguments.values.size() == 2 ? arguments.values[1] : Value(None{});
    }
    expect_count(arguments, 0, 0, place);
    if (name == "items" || name == "keys" || name == "values") return entries(dict, name);
  }
  if (value.string()) {
    const std::string& text = *value.string();
    place.budget.make(text.size(), place.line);
    if (name == "strip" || name == "lstrip" || name == "rstrip") return stripped(name, text, arguments, place);
    if (name == "replace") return replaced(text, arguments, place);
    if (name == "startswith" || name == "endswith") {
      expect_count(arguments, 1, 1, place);
      const std::string& part = text_argument(arguments, 0, place);
      if (part.size() > text.size()) return false;
      return text.compare(name == "startswith" ? 0 : text.size() - part.size(), part.size(), part) == 0;
    }
    if (name == "split") {
      expect_count(arguments, 0, 2, place);
      std::optional<std::string_view> separator;
      if (!arguments.values.empty() && !arguments.values[0].is_none()) separator = text_argument(arguments, 0, place);
      if (separator && separator->empty()) place.fail("split: an empty separator");
      const bool limited = arguments.values.size() == 2;
      if (limited && !arguments.values[1].is_number()) place.unsupported("split() with these arguments");
      return texts(split(text, separator, limited ? arguments.values[1].number() : -1), place);
    }
    if (name == "join") {
      expect_count(arguments, 1, 1, place);
      for (const Value& each : to_list(arguments.values[0], place)) {
        if (!each.string()) place.fail(std::string("join: expected strings, got ") + each.type_name());
      }
      return joined(to_list(arguments.values[0], place), text, place);
    }
    expect_count(arguments, 0, 0, place);
    if (name == "upper" || name == "lower" || name == "capitalize" || name == "title") {
      return with_case(name, text, place);
    }
  }
  if (value.is_undefined()) place.fail("\"" + name + "\" of an undefined value");
  place.unsupported("the method " + name + " of " + value.type_name());
}

bool is_function(const std::string& name) {
  static const std::set<std::string> names = {"namespace", "range",  "raise_exception", "strftime_now", "dict",
                                              "lipsum",    "cycler", "joiner",          "self"};
  return names.count(name) != 0;
}

Value call_function(const std::string& name, const Arguments& arguments, const Place& place) {
  if (name == "namespace") {
    if (!arguments.values.empty()) place.unsupported("namespace() with these arguments");
    auto space = std::make_shared<Namespace>();
    for (const auto& [key, value] : arguments.named) {
      check_held(value, place);
      space->fields[key] = value;
    }
    return space;
  }
  if (name == "raise_exception") throw TemplateRefusal(text_argument(arguments, 0, place));
  if (name == "range") {
    expect_count(arguments, 1, 2, place);
    for (const Value& bound : arguments.values) {
      if (!bound.is_number()) place.fail(std::string("range: expected a number, got ") + bound.type_name());
    }
    const int64_t begin = arguments.values.size() == 2 ? arguments.values[0].number() : 0;
    const int64_t end = arguments.values.back().number();
    if (end > begin && static_cast<uint64_t>(end) - static_cast<uint64_t>(begin) > 100000) {
      place.fail("range: more than 100000 numbers");
    }
    List list;
    for (int64_t i = begin; i < end; ++i) list.emplace_back(i);
    place.budget.make(64 * list.size(), place.line);
    return list;
  }
  if (name == "strftime_now") {
    const std::string& format = text_argument(arguments, 0, place);
    const std::time_t now = std::time(nullptr);
    std::tm local = {};
    char text[512];
    const size_t size = std::strftime(text, sizeof text, format.c_str(), localtime_r(&now, &local));
    if (size == 0 && !format.empty()) place.unsupported("this format of strftime_now");
    return std::string(text, size);
  }
  place.unsupported("calling " + name);
}

}  // namespace mixtral::jinja
