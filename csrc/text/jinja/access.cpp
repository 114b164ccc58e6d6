#include "access.h"

#include <set>

#include "error.h"
#include "python_text.h"

namespace mixtral::jinja {
namespace {

constexpr size_t kMaxWork = size_t{1} << 22;  // steps, and 64 bytes or items each; a second or so
constexpr int kMaxListDepth = 16;             // destructors go down by recursion

// Names that are methods of Python's dictionaries and texts: without a call they would not be what they seem.
const std::set<std::string> kDictMethods = {"clear", "copy",    "fromkeys",   "get",    "items", "keys",
                                            "pop",   "popitem", "setdefault", "update", "values"};

}  // namespace

List texts(const std::vector<std::string_view>& parts, const Place& place) {
  place.budget.make(64 * parts.size(), place.line);
  List list;
  for (const std::string_view part : parts) list.emplace_back(std::string(part));
  return list;
}

List entries(const Dict& dict, const std::string& what) {
  List list;
  for (const auto& [key, value] : dict)
    list.push_back(what == "items" ? List{key, value} : what == "keys" ? key : value);
  return list;
}

void Budget::spend(size_t work, int line) {
  spent_ += work;
  if (spent_ > kMaxWork) throw TemplateError(line, "rendering takes more work than a chat can need");
}

void Budget::make(size_t size, int line) {
  if (size > kMaxBytes) throw TemplateError(line, "makes a text of more than 16 MiB");
  spend(1 + size / 64, line);
}

void Place::fail(const std::string& reason) const { throw TemplateError(line, reason); }
void Place::unsupported(const std::string& what) const { fail(what + " is not supported"); }

std::string to_text(const Value& value, const Place& place) {
  if (value.is_undefined()) return "";
  if (value.is_none()) return "None";
  if (value.is<bool>()) return value.truth() ? "True" : "False";
  if (value.is<int64_t>()) return std::to_string(value.number());
  if (!value.string()) place.unsupported(std::string("printing ") + value.type_name());
  place.budget.make(value.string()->size(), place.line);
  return *value.string();
}

List to_list(const Value& value, const Place& place) {
  if (value.is_undefined()) return {};
  if (value.string()) return texts(characters(*value.string()), place);
  if (value.dict()) return entries(*value.dict(), "keys");
  if (!value.list()) place.fail(std::string("cannot go over ") + value.type_name());
  place.budget.make(value.list()->size(), place.line);
  return *value.list();
}

Value attribute(const Value& value, const std::string& name, const Place& place) {
  if (value.is_undefined()) place.fail("\"" + name + "\" of an undefined value");
  if (value.dict()) {
    if (kDictMethods.count(name) != 0) place.unsupported("the method " + name + " without a call");
    const Value* found = find(*value.dict(), name);
    return found ? *found : Value();
  }
  if (const auto* space = std::get_if<std::shared_ptr<Namespace>>(&value)) {
    const auto found = (*space)->fields.find(name);
    return found == (*space)->fields.end() ? Value() : found->second;
  }
  if (const Loop* loop = std::get_if<Loop>(&value)) {
    const List& items = *loop->items;
    const auto index = static_cast<int64_t>(loop->index), count = static_cast<int64_t>(items.size());
    if (name == "index0") return index;
    if (name == "index") return index + 1;
    if (name == "revindex0") return count - index - 1;
    if (name == "revindex") return count - index;
    if (name == "length") return count;
    if (name == "first") return index == 0;
    if (name == "last") return index + 1 == count;
    if (name == "previtem") return index == 0 ? Value() : items[loop->index - 1];
    if (name == "nextitem") return index + 1 == count ? Value() : items[loop->index + 1];
    place.unsupported("loop." + name);
  }
  if (value.is_none()) return {};
  place.unsupported("\"" + name + "\" of " + value.type_name());
}

Value item(const Value& value, const Value& key, const Place& place) {
  if (value.is_undefined()) place.fail("an item of an undefined value");
  if (key.string() && value.dict()) {
    const Value* found = find(*value.dict(), *key.string());
    return found ? *found : attribute(value, *key.string(), place);
  }
  if (key.is_number() && (value.list() || value.string())) {
    const List items = to_list(value, place);
    const int64_t index = key.number() < 0 ? key.number() + static_cast<int64_t>(items.size()) : key.number();
    return 0 <= index && index < static_cast<int64_t>(items.size()) ? items[static_cast<size_t>(index)] : Value();
  }
  if (key.string()) return attribute(value, *key.string(), place);
  place.unsupported(std::string("an item of ") + value.type_name() + " by " + key.type_name());
}

bool contains(const Value& container, const Value& value, const Place& place) {
  if (container.string()) {
    if (!value.string()) place.fail(std::string("cannot look for ") + value.type_name() + " in a string");
    place.budget.make(container.string()->size(), place.line);
    return container.string()->find(*value.string()) != std::string::npos;
  }
  for (const Value& each : to_list(container, place)) {
    if (equal(each, value)) return true;
  }
  return false;
}

void check_held(const Value& value, const Place& place, int depth) {
  place.budget.spend(1, place.line);
  if (value.is<std::shared_ptr<Namespace>>() || value.is<Loop>() || depth > kMaxListDepth) {
    place.unsupported(std::string(value.type_name()) + " in a value");
  }
  if (value.list()) {
    for (const Value& each : *value.list()) check_held(each, place, depth + 1);
  }
}

}  // namespace mixtral::jinja
