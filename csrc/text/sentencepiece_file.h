// Reads a SentencePiece model file and refuses everything a Mistral tokenizer does not need.
//
// The file is untrusted. What passes is BPE with identity normalisation, byte fallback and a sound vocabulary; fields
// that encoding does not need, such as a normalisation trie's or samples, are never looked into.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "vocabulary.h"

namespace mixtral {

struct SentencePieceFile {
  std::vector<SentencePiece> pieces;  // index = token id
  std::string unknown_surface;        // the text of the unknown token
};

// `file` names the model in errors. Throws LoadError.
SentencePieceFile parse_sentencepiece_file(std::string_view bytes, const std::string& file);

}  // namespace mixtral
