// A conversation in a file, in the form of a chat request: {"messages": [{"role": "user", "content": "Hi"}, ...]}.
#pragma once

#include <string>
#include <vector>

#include "../text/chat.h"

namespace mixtral::app {

// Throws std::invalid_argument when the file cannot be opened, LoadError when it holds no conversation.
std::vector<ChatMessage> read_conversation(const std::string& path);
// Replaces the file, or leaves it as it was and throws std::runtime_error.
void write_conversation(const std::vector<ChatMessage>& messages, const std::string& path);

}  // namespace mixtral::app
