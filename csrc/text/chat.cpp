#include "chat.h"

#include <stdexcept>

namespace mixtral {
namespace {

constexpr const char* kJoin = "\n\n";

[[noreturn]] void fail(size_t index, const std::string& reason) {
  throw std::invalid_argument("chat: message " + std::to_string(index) + ": " + reason);
}

void check(const std::vector<ChatMessage>& messages) {
  check_end(messages);
  for (size_t i = 0; i < messages.size(); ++i) {
    const ChatMessage& message = messages[i];
    const bool assistant = message.role == "assistant";
    if (!assistant && message.role != "user" && message.role != "system") {
      fail(i, "role must be system, user or assistant, got " + message.role);
    }
    if (message.role == "system" && i > 0 && messages[i - 1].role == "assistant") {
      fail(i, "role after assistant must be user or assistant, got system");
    }
    if (assistant && message.content.empty()) fail(i, "content of the assistant must not be empty");
  }
  if (messages.size() == 1 && messages[0].role == "assistant") {
    fail(0, "the first role must be user or system, got assistant");
  }
}

void append_text(std::string& text, const std::string& more) {
  if (!text.empty() && !more.empty()) text += kJoin;
  text += more;
}

// One text per run of messages of one role. Before v7 there are no system turns (their text goes into a user turn), yet
// a system message still ends a run; and a conversation starts with a user turn, empty if need be.
std::vector<ChatMessage> to_turns(const std::vector<ChatMessage>& messages, bool system_turns) {
  std::vector<ChatMessage> turns;
  std::string previous_role;
  for (const ChatMessage& message : messages) {
    if (message.role == "system") {
      if (system_turns) turns.push_back(message);
    } else if (message.role == previous_role) {
      append_text(turns.back().content, message.content);
      turns.back().prefix = message.prefix;
    } else {
      turns.push_back(message);
    }
    previous_role = message.role;
  }
  if (turns.empty() || (!system_turns && turns[0].role != "user")) {
    turns.insert(turns.begin(), ChatMessage{"user", ""});
  }
  return turns;
}

std::string system_prompt_of(const std::vector<ChatMessage>& messages) {
  std::string prompt;
  for (const ChatMessage& message : messages) {
    if (message.role == "system") append_text(prompt, message.content);
  }
  return prompt;
}

// The turn that carries the system prompt: v1 puts it into the first user turn, v2 and v3 into the last.
size_t turn_of_system_prompt(const std::vector<ChatMessage>& turns, TokenizerVersion version) {
  size_t carrier = 0;
  for (size_t i = 0; i < turns.size(); ++i) {
    if (turns[i].role == "user" && version != TokenizerVersion::kV1) carrier = i;
  }
  return carrier;
}

// Every turn is encoded on its own, so that each gets the space SentencePiece puts before a text.
class Writer {
 public:
  explicit Writer(const Tokenizer& tokenizer) : tokenizer_(tokenizer), ids_{tokenizer.bos_id()} {}

  void text(std::string_view text) {
    const std::vector<int64_t> ids = tokenizer_.encode(text);
    ids_.insert(ids_.end(), ids.begin(), ids.end());
  }
  void control(std::string_view piece) { ids_.push_back(*tokenizer_.control_id(piece)); }
  void enclosed(std::string_view begin, std::string_view content, std::string_view end) {
    control(begin);
    text(content);
    control(end);
  }
  std::vector<int64_t> take() { return std::move(ids_); }

 private:
  const Tokenizer& tokenizer_;
  std::vector<int64_t> ids_;
};

}  // namespace

void check_end(const std::vector<ChatMessage>& messages) {
  if (messages.empty()) throw std::invalid_argument("chat: messages must not be empty");
  for (size_t i = 0; i < messages.size(); ++i) {
    const bool last = i + 1 == messages.size();
    const bool assistant = messages[i].role == "assistant";
    if (messages[i].prefix && !(assistant && last)) {
      fail(i, "prefix must be set on the last message, an assistant's, only");
    }
    if (assistant && last && !messages[i].prefix) {
      fail(i, "the last role must be user, or assistant with prefix, got assistant");
    }
  }
}

std::vector<int64_t> apply_chat(const Tokenizer& tokenizer, TokenizerVersion version,
                                const std::vector<ChatMessage>& messages) {
  check(messages);
  const bool plain_markers = version == TokenizerVersion::kV1;
  const bool system_turns = version == TokenizerVersion::kV7;
  std::vector<ChatMessage> turns = to_turns(messages, system_turns);
  const std::string system_prompt = system_turns ? "" : system_prompt_of(messages);
  if (!system_prompt.empty()) {
    std::string& content = turns[turn_of_system_prompt(turns, version)].content;
    content = system_prompt + kJoin + content;
  }

  Writer writer(tokenizer);
  for (const ChatMessage& turn : turns) {
    if (turn.role == "system") {
      writer.enclosed("[SYSTEM_PROMPT]", turn.content, "[/SYSTEM_PROMPT]");
    } else if (turn.role == "user" && plain_markers) {
      writer.text("[INST] " + turn.content + " [/INST]");
    } else if (turn.role == "user") {
      writer.enclosed("[INST]", turn.content, "[/INST]");
    } else {
      // Trailing spaces of an answer are dropped since v2. (An answer of spaces alone becomes empty.)
      const size_t end = plain_markers ? turn.content.size() : turn.content.find_last_not_of(' ') + 1;
      writer.text(std::string_view(turn.content).substr(0, end));
      if (!turn.prefix) writer.control("</s>");
    }
  }
  return writer.take();
}

std::vector<int64_t> apply_chat(const Tokenizer& tokenizer, const std::vector<ChatMessage>& messages) {
  return apply_chat(tokenizer, tokenizer.version(), messages);
}

}  // namespace mixtral
