// `mixtral tokenize`: what the model is given for a text, and why.
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "../io/printable.h"
#include "../text/chat.h"
#include "../text/tokenizer.h"
#include "commands.h"
#include "flags.h"
#include "load.h"
#include "report.h"
#include "terminal.h"

namespace mixtral::app {
namespace {

struct Flags {
  ModelFlags model;
  PromptFlags prompt;
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

std::string bos_reason(const Flags& flags, const Tokenizer& tokenizer) {
  const std::string piece = tokenizer.piece(tokenizer.bos_id());
  if (flags.chat) return piece + " once, before the first turn of the conversation";
  if (flags.no_bos) return "none: --no-bos was given";
  const std::string before = piece + " put before the text, once";
  return flags.parse_special ? before : before + "; \"" + piece + "\" written in the text would stay text";
}

std::string eos_reason(const Flags& flags, const Tokenizer& tokenizer) {
  const std::string piece = tokenizer.piece(tokenizer.eos_id());
  if (flags.chat) return "none after the last turn: the answer is to come; " + piece + " ends each earlier answer";
  return "none: the text is to be continued; the model ends it with " + piece;
}

// `left`: control tokens that are written in the text and stayed text.
nlohmann::json to_json(const Flags& flags, const Tokenizer& tokenizer, const std::vector<int64_t>& ids,
                       const std::vector<int64_t>& left) {
  nlohmann::json pieces = nlohmann::json::array(), bytes = nlohmann::json::array();
  for (const int64_t id : ids) {
    pieces.push_back(tokenizer.piece(id));
    bytes.push_back(hex(token_bytes(tokenizer, id)));
  }
  nlohmann::json result = {{"token_ids", ids}, {"pieces", pieces}};
  if (flags.explain) {
    result["bytes"] = bytes;
    result["version"] = to_string(tokenizer.version());
    result["bos"] = bos_reason(flags, tokenizer);
    result["eos"] = eos_reason(flags, tokenizer);
    result["left_as_text"] = nlohmann::json::array();
    for (const int64_t id : left) result["left_as_text"].push_back({{"token_id", id}, {"piece", tokenizer.piece(id)}});
  }
  return result;
}

std::string explanation(const Flags& flags, const Tokenizer& tokenizer, const std::vector<int64_t>& ids,
                        const std::vector<int64_t>& left) {
  std::string text;
  for (const int64_t id : ids) {
    char number[24];
    std::snprintf(number, sizeof number, "%6lld  ", static_cast<long long>(id));
    const std::string bytes = tokenizer.is_control(id) ? "control" : hex(token_bytes(tokenizer, id));
    text += number + printable(tokenizer.piece(id)) + "  [" + bytes + "]\n";
  }
  text += "tokens: " + std::to_string(ids.size()) + ", tokenizer " + to_string(tokenizer.version()) + "\n";
  text += "BOS: " + bos_reason(flags, tokenizer) + "\n";
  text += "EOS: " + eos_reason(flags, tokenizer) + "\n";
  std::string names;
  for (const int64_t id : left)
    names += (names.empty() ? "" : ", ") + printable(tokenizer.piece(id)) + " (" + std::to_string(id) + ")";
  if (!left.empty()) {
    text += "left as text: " + names + (flags.chat ? "" : "; --parse-special makes control tokens of them") + "\n";
  }
  return text;
}

std::string id_line(const std::vector<int64_t>& ids) {
  std::string text;
  for (const int64_t id : ids) text += (text.empty() ? "" : " ") + std::to_string(id);
  return text + "\n";
}

void run(const Flags& flags) {
  const std::string prompt = read_prompt(flags.prompt);
  const Tokenizer tokenizer = load_tokenizer(flags.model);
  const std::vector<int64_t> ids =
      flags.chat ? apply_chat(tokenizer, {{"user", prompt}})
                 : tokenizer.encode(prompt, !flags.no_bos, /*add_eos=*/false, flags.parse_special);
  const std::vector<int64_t> left = flags.parse_special ? std::vector<int64_t>{} : tokenizer.special_in(prompt);
  if (flags.json) {
    write_out(json_line(to_json(flags, tokenizer, ids, left)));
  } else {
    write_out(flags.explain ? explanation(flags, tokenizer, ids, left) : id_line(ids));
  }
}

}  // namespace

void add_tokenize(CLI::App& app) {
  auto flags = std::make_shared<Flags>();
  CLI::App& command = *app.add_subcommand("tokenize", "Show the token ids of a text");
  add_prompt_flags(command, flags->prompt);
  add_switch(command, "--explain", flags->explain, "Pieces, bytes, and why BOS and EOS are there or not");
  CLI::Option* chat = add_switch(command, "--chat", flags->chat, "As the first message of a chat");
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
