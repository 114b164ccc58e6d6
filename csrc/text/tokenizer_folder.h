// Finds the tokenizer of a model folder and puts together what its files say.
#pragma once

#include <filesystem>
#include <string>

#include "vocabulary.h"

namespace mixtral {

struct TokenizerFiles {
  Vocabulary vocabulary;       // its pieces hold the added tokens too
  std::filesystem::path path;  // of the tokenizer.model, tokenizer.json or .gguf file
  std::string note;            // what the files disagree about; mostly empty
};

// The tokenizer.model of the newest version ("tokenizer.model.v3"), else tokenizer.json, else the only .gguf file;
// empty if the folder has none. A GGUF file is its own folder.
std::filesystem::path find_tokenizer(const std::filesystem::path& folder);

// `path`: a folder, a SentencePiece or GGUF file, or a tokenizer.json (a name that ends in ".json"). A folder's added
// tokens are those of tokenizer.json, then of added_tokens_decoder in tokenizer_config.json, then of added_tokens.json;
// a file's are its own. Throws LoadError.
TokenizerFiles read_tokenizer(const std::filesystem::path& path);

}  // namespace mixtral
