#include "json.h"

#include <utility>
#include <vector>

#include "load_error.h"

namespace mixtral {
namespace {

using nlohmann::json;

// nlohmann's own parser keeps the last of two equal keys in silence and bounds neither depth nor size.
class Builder : public JsonEvents {
 public:
  Builder(const std::string& source, const JsonMember& member) : JsonEvents(source), source_(source), member_(member) {}

  bool null() override { return scalar(nullptr); }
  bool boolean(bool value) override { return scalar(value); }
  bool number_integer(int64_t value) override { return scalar(value); }
  bool number_unsigned(uint64_t value) override { return scalar(value); }
  bool number_float(double value, const std::string&) override { return scalar(value); }
  bool string(std::string& value) override { return scalar(std::move(value)); }
  bool binary(json::binary_t&) override { return true; }
  bool start_object(size_t) override { return open(json::object()); }
  bool start_array(size_t) override { return open(json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool key(std::string& key) override {
    if (open_.back()->contains(key)) throw LoadError(source_, key, "key occurs twice");
    key_ = std::move(key);
    return true;
  }

  json take() { return std::move(root_); }

 private:
  json* put(json value) {
    constexpr size_t kMaxValues = size_t{1} << 17;
    if (++values_ > kMaxValues) {
      throw LoadError(source_, "", "JSON holds more than " + std::to_string(kMaxValues) + " values");
    }
    if (open_.empty()) return &(root_ = std::move(value));
    json& parent = *open_.back();
    if (parent.is_object()) return &(parent[key_] = std::move(value));
    parent.push_back(std::move(value));
    return &parent.back();
  }

  bool scalar(json value) {
    put(std::move(value));
    return finish_value();
  }

  bool open(json container) {
    constexpr size_t kMaxDepth = 64;
    if (open_.size() == kMaxDepth) {
      throw LoadError(source_, "", "JSON is nested deeper than " + std::to_string(kMaxDepth) + " levels");
    }
    open_.push_back(put(std::move(container)));
    return true;
  }

  bool close() {
    open_.pop_back();
    return finish_value();
  }

  bool finish_value() {
    if (member_ && open_.size() == 1) {
      member_(root_.begin().key(), root_.begin().value());
      root_.clear();
      values_ = 0;
    }
    return true;
  }

  const std::string& source_;
  const JsonMember& member_;  // empty: the whole is built
  json root_;
  std::vector<json*> open_;  // containers being read. An array never grows while one of its values is.
  std::string key_;          // of the value to come
  size_t values_ = 0;
};

// Between a quotation mark and the next, the library's lexer keeps two copies of what it reads, and more for an error.
void check_quotes(const std::string& text, const std::string& source) {
  constexpr size_t kMaxBytes = size_t{1} << 20;
  size_t quote = 0;  // the last one
  for (size_t i = 0; i < text.size(); ++i) {
    if (i - quote > kMaxBytes) throw LoadError(source, "", "JSON holds more than 1 MiB without a quotation mark");
    if (text[i] == '\\') {
      ++i;
    } else if (text[i] == '"') {
      quote = i;
    }
  }
}

constexpr size_t kMaxShownBytes = 64;

void append_shown(const json& value, std::string& out) {
  if (value.is_string()) {
    const std::string text = value.get_ref<const std::string&>().substr(0, kMaxShownBytes);
    out += json(text).dump(-1, ' ', true, json::error_handler_t::replace);
  } else if (value.is_structured()) {
    const char* separator = "";
    out += value.is_array() ? "[" : "{";
    for (const auto& [key, item] : value.items()) {
      out += std::exchange(separator, ",");
      if (value.is_object()) append_shown(key, out);
      if (value.is_object()) out += ":";
      append_shown(item, out);
      if (out.size() > kMaxShownBytes) return;
    }
    out += value.is_array() ? "]" : "}";
  } else {
    out += value.dump();
  }
}

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
  check_quotes(text, source);
  json::sax_parse(text, &events);
}

json parse_json(const std::string& text, const std::string& source) {
  const JsonMember none;
  Builder builder(source, none);
  read_json_events(text, source, builder);
  return builder.take();
}

void read_json_members(const std::string& text, const std::string& source, const JsonMember& member) {
  Builder builder(source, member);
  read_json_events(text, source, builder);
}

std::string shown(const json& value) {
  std::string text;
  append_shown(value, text);
  return text.size() > kMaxShownBytes ? text.substr(0, kMaxShownBytes) + "..." : text;
}

}  // namespace mixtral
