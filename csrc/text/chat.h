// Chat prompts as token ids, equal to mistral-common's for tokenizer versions v1, v2, v3 and v7.
#pragma once

#include <string>
#include <vector>

#include "tokenizer.h"

namespace mixtral {

struct ChatMessage {
  std::string role;  // "system", "user" or "assistant"
  std::string content;
  bool prefix = false;  // of the last message, an assistant's: the model goes on with it instead of answering
};

// Neighbouring messages of one role are joined by an empty line. `version`: whose format; the tokenizer must have its
// control tokens. Throws std::invalid_argument, naming the message, for what mistral-common refuses: no message, an
// unknown role, an empty answer, a system message right after an answer, or an end that leaves the model nothing to
// say.
std::vector<int64_t> apply_chat(const Tokenizer& tokenizer, TokenizerVersion version,
                                const std::vector<ChatMessage>& messages);
// In the format of the tokenizer's own version.
std::vector<int64_t> apply_chat(const Tokenizer& tokenizer, const std::vector<ChatMessage>& messages);

// Throws std::invalid_argument where `messages` leave the model nothing to say.
void check_end(const std::vector<ChatMessage>& messages);

}  // namespace mixtral
