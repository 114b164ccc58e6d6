// Reads a tokenizer.json of the SentencePiece kind: BPE with byte fallback, where U+2581 stands for a space.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "vocabulary.h"

namespace mixtral {

// `file` names the file in errors. Throws LoadError, which names the kind, for every other kind of tokenizer.
Vocabulary parse_tokenizer_json(const std::string& text, const std::string& file);

// An added token as tokenizer.json and tokenizer_config.json describe it.
AddedToken read_added_token(const nlohmann::json& object, int64_t id, const std::string& file);

}  // namespace mixtral
