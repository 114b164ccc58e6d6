#include "conversation_file.h"

#include <cstddef>
#include <nlohmann/json.hpp>

#include "../checkpoint/output_folder.h"
#include "../io/json.h"
#include "../io/load_error.h"
#include "terminal.h"

namespace mixtral::app {
namespace {

using nlohmann::json;

std::string text_field(const json& message, const char* key, const std::string& path, size_t index) {
  const auto found = message.is_object() ? message.find(key) : message.end();
  if (found == message.end() || !found->is_string()) {
    throw LoadError(path, "message " + std::to_string(index), std::string(key) + " must be a text");
  }
  return *found;
}

}  // namespace

std::vector<ChatMessage> read_conversation(const std::string& path) {
  const json conversation = parse_json(read_file(path), path);
  const auto found = conversation.find("messages");
  if (found == conversation.end() || !found->is_array())
    throw LoadError(path, "messages", "must be a list of messages");
  std::vector<ChatMessage> messages;
  for (const json& message : *found) {
    const size_t index = messages.size();
    const std::string role = text_field(message, "role", path, index);
    if (role != "system" && role != "user" && role != "assistant") {
      throw LoadError(path, "message " + std::to_string(index), "role must be system, user or assistant");
    }
    messages.push_back({role, text_field(message, "content", path, index)});
  }
  return messages;
}

void write_conversation(const std::vector<ChatMessage>& messages, const std::string& path) {
  json list = json::array();
  for (const ChatMessage& message : messages) list.push_back({{"role", message.role}, {"content", message.content}});
  const std::string text = json({{"messages", list}}).dump(2, ' ', false, json::error_handler_t::replace) + "\n";
  replace_file(path, [&text](OutputFile& file) { file.write(text.data(), text.size()); });
}

}  // namespace mixtral::app
