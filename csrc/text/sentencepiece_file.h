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

// What the library decodes the unknown token to, where a file does not say otherwise.
inline constexpr const char* kUnknownSurface = " \xE2\x81\x87 ";

// Throws LoadError (`file`, `item`) for a piece that no sound vocabulary has.
void check_piece(const SentencePiece& piece, const std::string& file, const std::string& item);
// Throws LoadError unless the pieces are distinct, one of them unknown, 256 bytes, and one a space. Ids without a piece
// do not count.
void check_vocabulary(const std::vector<SentencePiece>& pieces, const std::string& file);

// `file` names the model in errors. Throws LoadError.
SentencePieceFile parse_sentencepiece_file(std::string_view bytes, const std::string& file);

}  // namespace mixtral
