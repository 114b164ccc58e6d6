// Chat prompts as token ids, equal to mistral-common's for tokenizer versions v1, v2, v3 and v7.
#pragma once

#include <string>
#include <vector>

#include "tokenizer.h"

namespace mixtral {

struct ChatMessage {
  std::string role;  // "system", "user", "assistant" or "tool"
  std::string content;
  bool prefix = false;  // of the last message, an assistant's: the model goes on with it instead of answering
  std::vector<std::string> tool_calls = {};  // of an assistant: each as the JSON that the model writes
  std::string tool_call_id = {};             // of a tool's message, which holds the result of this call: for v7
};

// Neighbouring messages of one role are joined by an empty line. `version`: whose format; the tokenizer must have its
// control tokens. `tools`: what the model may call, a JSON array; empty: nothing. The content of a tool's message is
// JSON before v7, and any text since. Throws std::invalid_argument, naming the message, for what mistral-common
// refuses: no message, an unknown role, an empty answer, a system message right after an answer, an end that leaves the
// model nothing to say, tools with v1, or calls without as many results.
std::vector<int64_t> apply_chat(const Tokenizer& tokenizer, TokenizerVersion version,
                                const std::vector<ChatMessage>& messages, const std::string& tools = "");
// In the format of the tokenizer's own version.
std::vector<int64_t> apply_chat(const Tokenizer& tokenizer, const std::vector<ChatMessage>& messages);

// Throws std::invalid_argument where `messages` leave the model nothing to say.
void check_end(const std::vector<ChatMessage>& messages);

}  // namespace mixtral
