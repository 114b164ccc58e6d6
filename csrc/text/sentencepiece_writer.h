// Writes a SentencePiece model file, for a vocabulary that came from elsewhere.
#pragma once

#include <string>

#include "vocabulary.h"

namespace mixtral {

// The bytes of a tokenizer.model from which parse_sentencepiece_file reads the same pieces, but for those without a
// text at the end. Throws LoadError (`file`) when ids between others have no text.
std::string sentencepiece_bytes(const Vocabulary& vocabulary, const std::string& file);

}  // namespace mixtral
