// Chat prompts as token ids, equal to mistral-common's for tokenizer versions v1, v2 and v3.
#pragma once

#include "tokenizer.h"

#include <string>
#include <vector>

namespace mixtral {

struct ChatMessage {
  std::string role;  // "system", "user" or "assistant"
  std::string content;
};

// Throws std::invalid_argument, naming the message, when roles do not alternate or the last one is not the user's.
std::vector<int64_t> apply_chat(const Tokenizer& tokenizer, const std::vector<ChatMessage>& messages);

}  // namespace mixtral
