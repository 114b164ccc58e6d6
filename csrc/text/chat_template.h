// The chat template of a model folder, and what it is given. The template is Jinja: jinja/ renders what it knows of it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "chat.h"

namespace mixtral {

inline constexpr uint64_t kMaxTemplateBytes = uint64_t{1} << 18;

struct ChatTemplateText {
  std::string text;
  std::string file;  // that it was read from
};

// chat_template.jinja, else `chat_template` of tokenizer_config.json: a text, or the one named "default" of several.
// Of a GGUF file: tokenizer.chat_template. None if the folder has none. Throws LoadError.
std::optional<ChatTemplateText> find_chat_template(const std::filesystem::path& folder);

// The variables bos_token, eos_token and so on of templates: from tokenizer_config.json, else special_tokens_map.json.
// A token that neither file has is missing here; for one that is null the text is empty. Throws LoadError.
std::map<std::string, std::string> special_token_texts(const std::filesystem::path& folder);

class ChatTemplate {
 public:
  // Throws LoadError: what is no Jinja, or a part of it that the binary does not know.
  explicit ChatTemplate(const ChatTemplateText& source);

  // The text of the conversation; with `add_generation_prompt` up to where the model's answer begins, unless the last
  // message is to be gone on with. `special_tokens`: as above. Throws
  // std::invalid_argument with the template's own words where it raises an exception, or does not show the message that
  // the model is to go on with; LoadError for other faults, among them a text of 16 MiB and too much work.
  std::string render(const std::vector<ChatMessage>& messages, const std::map<std::string, std::string>& special_tokens,
                     bool add_generation_prompt = true) const;

 private:
  struct Impl;
  std::shared_ptr<const Impl> impl_;
};

}  // namespace mixtral
