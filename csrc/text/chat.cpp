#include "chat.h"

#include <algorithm>
#include <optional>
#include <stdexcept>

namespace mixtral {
namespace {

constexpr const char* kJoin = "\n\n";

[[noreturn]] void fail(size_t index, const std::string& reason) {
  throw std::invalid_argument("chat: message " + std::to_string(index) + ": " + reason);
}

// Every answer that calls tools is followed by as many results, before the next answer and before the end.
void check_results(const std::vector<ChatMessage>& messages) {
  size_t caller = 0, missing = 0;
  for (size_t i = 0; i < messages.size(); ++i) {
    if (messages[i].role == "tool") {
      if (missing == 0) fail(i, "a tool's message must be the result of a call, and each call has one");
      --missing;
    } else if (messages[i].role == "assistant") {
      if (missing > 0) break;
      caller = i;
      missing = messages[i].tool_calls.size();
    }
  }
  if (missing > 0) fail(caller, "has " + std::to_string(missing) + " tool calls without a result");
}

void check(const std::vector<ChatMessage>& messages) {
  check_end(messages);
  for (size_t i = 0; i < messages.size(); ++i) {
    const ChatMessage& message = messages[i];
    const std::string before = i > 0 ? messages[i - 1].role : "";
    const bool assistant = message.role == "assistant";
    if (!assistant && message.role != "user" && message.role != "system" && message.role != "tool") {
      fail(i, "role must be system, user, assistant or tool, got " + message.role);
    }
    if (message.role == "system" && (before == "assistant" || before == "tool")) {
      fail(i, "role after " + before + " must be user or assistant, got system");
    }
    if (message.role == "tool" && before != "assistant" && before != "tool") {
      fail(i, "role before tool must be assistant or tool, got " + (before.empty() ? "none" : before));
    }
    if (assistant && message.content.empty() && message.tool_calls.empty()) {
      fail(i, "content of the assistant must not be empty");
    }
    if (message.prefix && !message.tool_calls.empty()) fail(i, "a message with tool calls cannot be gone on with");
  }
  if (messages.size() == 1 && messages[0].role == "assistant") {
    fail(0, "the first role must be user or system, got assistant");
  }
  check_results(messages);
}

bool uses_tools(const std::vector<ChatMessage>& messages) {
  return std::any_of(messages.begin(), messages.end(),
                     [](const ChatMessage& message) { return message.role == "tool" || !message.tool_calls.empty(); });
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
    } else if (message.role == previous_role && message.role != "tool") {
      append_text(turns.back().content, message.content);
      turns.back().prefix = message.prefix;
      turns.back().tool_calls = message.tool_calls;  // none before: a message with calls is followed by results
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

std::optional<size_t> last_user_turn(const std::vector<ChatMessage>& turns) {
  for (size_t i = turns.size(); i-- > 0;) {
    if (turns[i].role == "user") return i;
  }
  return std::nullopt;
}

void check_text_or_calls(const std::vector<ChatMessage>& turns, TokenizerVersion version) {
  for (const ChatMessage& turn : turns) {
    if (turn.content.empty() || turn.tool_calls.empty() || version == TokenizerVersion::kV7) continue;
    throw std::invalid_argument("chat: an answer has text or tool calls with tokenizer " + to_string(version) +
                                ", not both");
  }
}

// v2 shows calls and results only behind the last user turn, and there one result after an answer.
void drop_finished_calls(std::vector<ChatMessage>& turns, size_t last_user) {
  const auto begin = turns.begin() + static_cast<std::ptrdiff_t>(last_user);
  turns.erase(std::remove_if(turns.begin(), begin,
                             [](const ChatMessage& turn) { return turn.role == "tool" || !turn.tool_calls.empty(); }),
              begin);
  for (size_t i = 1; i < turns.size(); ++i) {
    if (turns[i].role == "tool" && turns[i - 1].role == "tool") {
      throw std::invalid_argument("chat: tokenizer v2 takes the result of one tool call after an answer, not more");
    }
  }
}

// Every turn is encoded on its own, so that each gets the space SentencePiece puts before a text.
class Writer {
 public:
  explicit Writer(const Tokenizer& tokenizer) : tokenizer_(tokenizer), ids_{tokenizer.bos_id()} {}

  void text(std::string_view text) {
    const std::vector<int64_t> ids = tokenizer_.encode(text);
    ids_.insert(ids_.end(), ids.begin(), ids.end());
  }
  void control(std::string_view piece) {
    const std::optional<int64_t> id = tokenizer_.control_id(piece);
    if (!id) throw std::invalid_argument("chat: the tokenizer has no control token " + std::string(piece));
    ids_.push_back(*id);
  }
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

void write_answer(Writer& writer, const ChatMessage& turn, TokenizerVersion version) {
  // Trailing spaces of an answer are dropped since v2. (An answer of spaces alone becomes empty.)
  const bool keep = version == TokenizerVersion::kV1;
  const size_t end = keep ? turn.content.size() : turn.content.find_last_not_of(' ') + 1;
  writer.text(std::string_view(turn.content).substr(0, end));
  if (!turn.tool_calls.empty()) {
    std::string calls;
    for (const std::string& call : turn.tool_calls) calls += (calls.empty() ? "" : ", ") + call;
    writer.control("[TOOL_CALLS]");
    writer.text("[" + calls + "]");
  }
  if (!turn.prefix) writer.control("</s>");
}

void write_result(Writer& writer, const ChatMessage& turn, TokenizerVersion version) {
  writer.control("[TOOL_RESULTS]");
  if (version == TokenizerVersion::kV7) {
    writer.text(turn.tool_call_id);
    writer.control("[TOOL_CONTENT]");
  }
  writer.text(turn.content);
  writer.control("[/TOOL_RESULTS]");
}

void write_turn(Writer& writer, const ChatMessage& turn, TokenizerVersion version) {
  if (turn.role == "system") {
    writer.enclosed("[SYSTEM_PROMPT]", turn.content, "[/SYSTEM_PROMPT]");
  } else if (turn.role == "user" && version == TokenizerVersion::kV1) {
    writer.text("[INST] " + turn.content + " [/INST]");
  } else if (turn.role == "user") {
    writer.enclosed("[INST]", turn.content, "[/INST]");
  } else if (turn.role == "tool") {
    write_result(writer, turn, version);
  } else {
    write_answer(writer, turn, version);
  }
}

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
                                const std::vector<ChatMessage>& messages, const std::string& tools) {
  check(messages);
  if (version == TokenizerVersion::kV1 && (!tools.empty() || uses_tools(messages))) {
    throw std::invalid_argument("chat: tokenizer v1 has no tool calls, they need v2, v3 or v7");
  }
  std::vector<ChatMessage> turns = to_turns(messages, version == TokenizerVersion::kV7);
  check_text_or_calls(turns, version);
  if (version == TokenizerVersion::kV2) drop_finished_calls(turns, *last_user_turn(turns));
  const std::optional<size_t> last_user = last_user_turn(turns);
  if (version != TokenizerVersion::kV7) {
    const std::string system_prompt = system_prompt_of(messages);
    std::string& carrier = turns[version == TokenizerVersion::kV1 ? 0 : *last_user].content;
    if (!system_prompt.empty()) carrier = system_prompt + kJoin + carrier;
  }

  Writer writer(tokenizer);
  for (size_t i = 0; i < turns.size(); ++i) {
    if (i == last_user && !tools.empty()) writer.enclosed("[AVAILABLE_TOOLS]", tools, "[/AVAILABLE_TOOLS]");
    write_turn(writer, turns[i], version);
  }
  return writer.take();
}

std::vector<int64_t> apply_chat(const Tokenizer& tokenizer, const std::vector<ChatMessage>& messages) {
  return apply_chat(tokenizer, tokenizer.version(), messages);
}

}  // namespace mixtral
