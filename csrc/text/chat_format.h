// How a conversation becomes token ids for one model: by the chat template of its folder, else by its tokenizer.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "chat.h"
#include "tokenizer.h"

namespace mixtral {

// The formats that have a name and are a Jinja template, with it: chatml, zephyr, llama-2, alpaca, vicuna. The others,
// mistral-v1, -v2, -v3 and -v7, are code (chat.h): no template gives their ids for every text.
const std::vector<std::pair<std::string, std::string>>& named_chat_templates();

class ChatFormat {
 public:
  // `wanted`: the name of a format or a file with a Jinja template; empty: the template of the folder, else the format
  // of the tokenizer's version. Throws LoadError for a template that the binary cannot render; std::invalid_argument
  // for a name that is unknown, and for the folder of a base model: one with config.json, no template and no control
  // tokens for a chat.
  ChatFormat(const std::filesystem::path& folder, const Tokenizer& tokenizer, const std::string& wanted = "");

  // The ids of the prompt. Control tokens written in a template's messages are read, as transformers does it. `tools`:
  // as of apply_chat. Throws std::invalid_argument for what the format refuses, and for tools with a template;
  // LoadError as ChatTemplate::render does.
  std::vector<int64_t> encode(const std::vector<ChatMessage>& messages, const std::string& tools = "") const;

  // "chatml"; "custom" where no format with a name gives the same ids.
  const std::string& name() const;
  // Where it comes from: "tokenizer_config.json", "--chat-template", "tokenizer v3".
  const std::string& source() const;
  // Whether control tokens that are written in a message become these tokens: so with templates.
  bool reads_control_tokens() const;
  // What stands behind an answer, such as "<|im_end|>": the model ends its answers so. Empty if nothing does.
  std::string end_of_answer() const;

 private:
  struct Impl;
  std::shared_ptr<const Impl> impl_;
};

}  // namespace mixtral
