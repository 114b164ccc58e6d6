// SentencePiece BPE tokenizer of the Mistral family, and decoding as a stream.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace mixtral {

// Which control tokens and chat format the tokenizer has (mistral-common's names).
enum class TokenizerVersion { kV1, kV2, kV3 };

class Tokenizer {
 public:
  // `path`: a tokenizer.model file, or a folder that holds one (tokenizer.model, tokenizer.model.v3, ...).
  // Throws LoadError when the file is not a valid BPE SentencePiece model.
  explicit Tokenizer(const std::filesystem::path& path);

  // Text only: "[INST]" or "</s>" in it stays text. Invalid UTF-8 is encoded byte by byte.
  std::vector<int64_t> encode(std::string_view text, bool add_bos = false, bool add_eos = false) const;
  // Control tokens decode to nothing. Throws std::out_of_range for an id outside [0, vocab_size).
  std::string decode(const std::vector<int64_t>& ids) const;
  // The piece as stored: "▁the", "<0x0A>", "[INST]".
  std::string piece(int64_t id) const;
  bool is_control(int64_t id) const;
  bool is_byte(int64_t id) const;

  int64_t vocab_size() const;
  int64_t bos_id() const;
  int64_t eos_id() const;
  TokenizerVersion version() const;

 private:
  struct Impl;
  std::shared_ptr<const Impl> impl_;  // immutable: copies share it
};

// Ids in, text out: never half a code point. The pieces put together equal Tokenizer::decode of all ids.
class StreamingDecoder {
 public:
  explicit StreamingDecoder(Tokenizer tokenizer) : tokenizer_(std::move(tokenizer)) {}
  std::string push(int64_t id);  // text completed by this token; may be empty
  std::string flush();           // what is left: U+FFFD for a cut code point

 private:
  Tokenizer tokenizer_;
  std::string pending_;
  bool at_start_ = true;
};

}  // namespace mixtral
