// The tokenizer that a GGUF file has in its metadata.
#pragma once

#include <filesystem>
#include <optional>
#include <string>

#include "vocabulary.h"

namespace mixtral {

// Of the SentencePiece kind, which is called "llama" there. Throws LoadError, which names the kind, for every other
// one.
Vocabulary read_gguf_tokenizer(const std::filesystem::path& path);

// The GGUF file that the tokenizer of `folder` is in; empty when it has another one, or none. Throws LoadError.
std::filesystem::path find_gguf_tokenizer(const std::filesystem::path& folder);

// tokenizer.chat_template: Jinja. Throws LoadError when the file is not valid.
std::optional<std::string> read_gguf_chat_template(const std::filesystem::path& path);

}  // namespace mixtral
