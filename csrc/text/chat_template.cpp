#include "chat_template.h"

#include <stdexcept>
#include <utility>

#include "../io/file.h"
#include "../io/json.h"
#include "../io/load_error.h"
#include "gguf_tokenizer.h"
#include "jinja/error.h"
#include "jinja/parser.h"
#include "jinja/python_text.h"
#include "jinja/render.h"

namespace mixtral {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr uint64_t kMaxConfigBytes = uint64_t{8} << 20;
// Put behind the message that the model goes on with, and cut off again, as transformers does it.
constexpr std::string_view kCut = "CONTINUE_FINAL_MESSAGE_TAG ";

json read_if_there(const fs::path& path) {
  std::error_code error;
  if (!fs::is_regular_file(path, error)) return json::object();
  return parse_json(read_text(path, kMaxConfigBytes), path.string());
}

std::optional<ChatTemplateText> template_in(const json& value, const std::string& file) {
  if (value.is_null()) return std::nullopt;
  if (value.is_string()) return ChatTemplateText{value.get<std::string>(), file};
  if (!value.is_array()) throw LoadError(file, "chat_template", "must be a text or a list of templates");
  for (const json& each : value) {
    const bool named = each.is_object() && each.contains("name") && each.contains("template");
    if (named && each["name"] == "default" && each["template"].is_string()) {
      return ChatTemplateText{each["template"].get<std::string>(), file};
    }
  }
  throw LoadError(file, "chat_template", "has no template that is named \"default\"");
}

jinja::Value message_value(const ChatMessage& message, bool cut) {
  return jinja::Dict{{"role", message.role}, {"content", message.content + std::string(cut ? kCut : "")}};
}

// Cuts the text behind the message that the model goes on with.
std::string cut(const std::string& text) {
  const std::string_view mark = kCut.substr(0, kCut.size() - 1);
  const size_t place = text.rfind(mark);
  if (place == std::string::npos) {
    throw std::invalid_argument("chat: the chat template does not show the message that the model is to go on with");
  }
  const std::string_view before = std::string_view(text).substr(0, place);
  const bool keeps_spaces = text.compare(place, kCut.size(), kCut) == 0;
  return std::string(keeps_spaces ? before : jinja::strip(before, /*left=*/false));
}

[[noreturn]] void fail(const std::string& file, const jinja::TemplateError& error) {
  throw LoadError(
      file, "chat_template",
      std::string(error.what()) + "; Python may know more of Jinja, and --chat-template NAME chooses a format");
}

}  // namespace

std::optional<ChatTemplateText> find_chat_template(const fs::path& folder) {
  const fs::path file = folder / "chat_template.jinja", config = folder / "tokenizer_config.json";
  std::error_code error;
  if (fs::exists(file, error)) return ChatTemplateText{read_text(file, kMaxTemplateBytes), file.string()};
  if (auto found = template_in(read_if_there(config).value("chat_template", json()), config.string())) return found;
  const fs::path gguf = find_gguf_tokenizer(folder);
  const auto text = gguf.empty() ? std::nullopt : read_gguf_chat_template(gguf);
  return text ? std::make_optional(ChatTemplateText{*text, gguf.string()}) : std::nullopt;
}

std::map<std::string, std::string> special_token_texts(const fs::path& folder) {
  const json config = read_if_there(folder / "tokenizer_config.json");
  const json map = read_if_there(folder / "special_tokens_map.json");
  std::map<std::string, std::string> texts;
  for (const char* key : {"bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"}) {
    const json* source = config.contains(key) ? &config : map.contains(key) ? &map : nullptr;
    if (!source) continue;
    const json& value = source->at(key);
    const json& text = value.is_object() ? value.value("content", json()) : value;
    texts[key] = text.is_string() ? text.get<std::string>() : "";
  }
  return texts;
}

struct ChatTemplate::Impl {
  std::string file;
  jinja::Node root;
};

ChatTemplate::ChatTemplate(const ChatTemplateText& source) {
  if (source.text.size() > kMaxTemplateBytes) throw LoadError(source.file, "chat_template", "has more than 256 KiB");
  try {
    impl_ = std::make_shared<const Impl>(Impl{source.file, jinja::parse(source.text)});
  } catch (const jinja::TemplateError& error) {
    fail(source.file, error);
  }
}

std::string ChatTemplate::render(const std::vector<ChatMessage>& messages,
                                 const std::map<std::string, std::string>& special_tokens,
                                 bool add_generation_prompt) const {
  const bool goes_on = !messages.empty() && messages.back().prefix;
  jinja::List list;
  for (const ChatMessage& message : messages) list.push_back(message_value(message, message.prefix));
  std::map<std::string, jinja::Value> variables = {{"messages", std::move(list)},
                                                   {"add_generation_prompt", add_generation_prompt && !goes_on},
                                                   {"tools", jinja::None{}},
                                                   {"documents", jinja::None{}}};
  for (const auto& [name, text] : special_tokens) {
    if (!text.empty()) variables[name] = text;
  }
  try {
    const std::string text = jinja::render(impl_->root, variables);
    return goes_on ? cut(text) : text;
  } catch (const jinja::TemplateRefusal& refusal) {
    throw std::invalid_argument(std::string("chat: the chat template says: ") + refusal.what());
  } catch (const jinja::TemplateError& error) {
    fail(impl_->file, error);
  }
}

}  // namespace mixtral
