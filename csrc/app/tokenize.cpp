// `mixtral tokenize`: what the model is given for a text, and why.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>

#include "../io/printable.h"
#include "../text/chat_format.h"
#include "../text/tokenizer.h"
#include "commands.h"
#include "flags.h"
#include "load.h"
#include "report.h"
#include "terminal.h"

namespace mixtral::app {
namespace {

struct TokenizeFlags {
  ModelFlags model;
  PromptFlags prompt;
  std::string chat_template;
  bool chat = false, explain = false, no_bos = false, parse_special = false, json = false;
};

// The bytes of text that one token stands for; none for a control token.
std::string token_bytes(const Tokenizer& tokenizer, int64_t id) {
  if (tokenizer.is_control(id)) return "";
  std::string piece = tokenizer.piece(id);
  if (tokenizer.is_byte(id)) {  // "<0x0A>"
    return std::string(1, static_cast<char>(std::strtol(piece.substr(3, 2).c_str(), nullptr, 16)));
  }
  const std::string space = "\u2581";  // SentencePiece writes a space as a low bar
  for (size_t at = piece.find(space); at != std::string::npos; at = piece.find(space, at)) {
    piece.replace(at, space.size(), " ");
  }
  return piece;
}

std::string hex(const std::string& bytes) {
  std::string text;
  for (const unsigned char byte : bytes) {
    char pair[4];
    std::snprintf(pair, sizeof pair, text.empty() ? "%02x" : " %02x", byte);
    text += pair;
  }
  return text;
}

// What was made of the text.
struct Tokens {
  std::vector<int64_t> ids;
  std::vector<int64_t> left;         // control tokens that are written in the text and stayed text
  std::optional<ChatFormat> format;  // with --chat
};

Tokens tokens_of(const TokenizeFlags& flags, const Tokenizer& tokenizer, const std::string& prompt) {
  Tokens tokens;
  if (flags.chat) {
    tokens.format.emplace(model_path(flags.model), tokenizer, flags.chat_template);
    tokens.ids = tokens.format->encode({{"user", prompt}});
  } else {
    tokens.ids = tokenizer.encode(prompt, !flags.no_bos, /*add_eos=*/false, flags.parse_special);
  }
  const bool read = flags.chat ? tokens.format->reads_control_tokens() : flags.parse_special;
  if (!read) tokens.left = tokenizer.special_in(prompt);
  return tokens;
}

std::string bos_reason(const TokenizeFlags& flags, const Tokenizer& tokenizer, const Tokens& tokens) {
  const std::string piece = tokenizer.piece(tokenizer.bos_id());
  if (flags.chat && (tokens.ids.empty() || tokens.ids[0] != tokenizer.bos_id()))
    return "none: the chat format has none";
  if (flags.chat) return piece + " once, before the first turn of the conversation";
  if (flags.no_bos) return "none: --no-bos was given";
  const std::string before = piece + " put before the text, once";
  return flags.parse_special ? before : before + "; \"" + piece + "\" written in the text would stay text";
}

std::string eos_reason(const TokenizeFlags& flags, const Tokenizer& tokenizer, const Tokens& tokens) {
  const std::string piece = flags.chat ? tokens.format->end_of_answer() : tokenizer.piece(tokenizer.eos_id());
  if (flags.chat && piece.empty()) return "none: the chat format has none";
  if (flags.chat) return "none after the last turn: the answer is to come; " + piece + " ends each earlier answer";
  return "none: the text is to be continued; the model ends it with " + piece;
}

std::string format_of(const Tokens& tokens) { return tokens.format->name() + " (" + tokens.format->source() + ")"; }

nlohmann::json to_json(const TokenizeFlags& flags, const Tokenizer& tokenizer, const Tokens& tokens) {
  nlohmann::json pieces = nlohmann::json::array(), bytes = nlohmann::json::array();
  for (const int64_t id : tokens.ids) {
    pieces.push_back(tokenizer.piece(id));
    bytes.push_back(hex(token_bytes(tokenizer, id)));
  }
  nlohmann::json result = {{"token_ids", tokens.ids}, {"pieces", pieces}};
  if (flags.explain) {
    result["bytes"] = bytes;
    result["version"] = to_string(tokenizer.version());
    result["bos"] = bos_reason(flags, tokenizer, tokens);
    result["eos"] = eos_reason(flags, tokenizer, tokens);
    if (flags.chat) result["chat_format"] = format_of(tokens);
    result["left_as_text"] = nlohmann::json::array();
    for (const int64_t id : tokens.left)
      result["left_as_text"].push_back({{"token_id", id}, {"piece", tokenizer.piece(id)}});
  }
  return result;
}

std::string explanation(const TokenizeFlags& flags, const Tokenizer& tokenizer, const Tokens& tokens) {
  std::string text;
  for (const int64_t id : tokens.ids) {
    char number[24];
    std::snprintf(number, sizeof number, "%6lld  ", static_cast<long long>(id));
    const std::string bytes = tokenizer.is_control(id) ? "control" : hex(token_bytes(tokenizer, id));
    text += number + printable(tokenizer.piece(id)) + "  [" + bytes + "]\n";
  }
  text += "tokens: " + std::to_string(tokens.ids.size()) + ", tokenizer " + to_string(tokenizer.version()) + "\n";
  if (flags.chat) text += "chat format: " + format_of(tokens) + "\n";
  text += "BOS: " + bos_reason(flags, tokenizer, tokens) + "\n";
  text += "EOS: " + eos_reason(flags, tokenizer, tokens) + "\n";
  std::string names;
  for (const int64_t id : tokens.left)
    names += (names.empty() ? "" : ", ") + printable(tokenizer.piece(id)) + " (" + std::to_string(id) + ")";
  if (!tokens.left.empty()) {
    text += "left as text: " + names + (flags.chat ? "" : "; --parse-special makes control tokens of them") + "\n";
  }
  return text;
}

std::string id_line(const std::vector<int64_t>& ids) {
  std::string text;
  for (const int64_t id : ids) text += (text.empty() ? "" : " ") + std::to_string(id);
  return text + "\n";
}

void run(const TokenizeFlags& flags) {
  const std::string prompt = read_prompt(flags.prompt);
  const Tokenizer tokenizer = load_tokenizer(flags.model);
  const Tokens tokens = tokens_of(flags, tokenizer, prompt);
  if (flags.json) {
    write_out(json_line(to_json(flags, tokenizer, tokens)));
  } else {
    write_out(flags.explain ? explanation(flags, tokenizer, tokens) : id_line(tokens.ids));
  }
}

}  // namespace

void add_tokenize(CLI::App& app) {
  auto flags = std::make_shared<TokenizeFlags>();
  CLI::App& command = *app.add_subcommand("tokenize", "Show the token ids of a text");
  add_prompt_flags(command, flags->prompt);
  add_switch(command, "--explain", flags->explain, "Pieces, bytes, and why BOS and EOS are there or not");
  CLI::Option* chat = add_switch(command, "--chat", flags->chat, "As the first message of a chat");
  add_chat_template(command, flags->chat_template)->needs(chat);
  add_switch(command, "--no-bos", flags->no_bos, "Without the beginning-of-sequence token")->excludes(chat);
  add_parse_special(command, flags->parse_special)->excludes(chat);
  add_switch(command, "--json", flags->json, "One JSON object");
  add_model_path(command, flags->model);
  command.footer(
      "Examples:\n"
      "  mixtral tokenize -p \"Hello, world\"\n"
      "  mixtral tokenize ./Mixtral-8x7B-Instruct-v0.1 -p \"Hello\" --chat --explain");
  command.callback([flags] { run(*flags); });
}

}  // namespace mixtral::app
