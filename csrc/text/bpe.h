// Byte-pair encoding: the characters of a text, merged two by two. The best pair goes first, of equals the leftmost.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "prefix_matcher.h"
#include "vocabulary.h"

namespace mixtral {

class Bpe {
 public:
  Bpe() = default;
  // Keeps views of the texts of `pieces`, which must stay where they are.
  Bpe(const std::vector<SentencePiece>& pieces, const Vocabulary& vocabulary);

  // Appends the ids of `text`, whose spaces are U+2581. A character without a piece, and a byte that belongs to no
  // character, become byte tokens. Takes n log n steps.
  void encode(std::string_view text, std::vector<int64_t>& ids) const;

 private:
  struct Joined {
    float cost = 0;  // the least goes first
    int32_t id = -1;
  };
  struct Symbol;
  Joined joined(std::string_view text, const Symbol& left, const Symbol& right) const;
  std::vector<Symbol> symbols_of(std::string_view text) const;

  std::unordered_map<std::string_view, Joined> pieces_;  // that text can become
  std::unordered_map<uint64_t, Joined> merges_;          // by the two ids; empty unless `ranked_`
  bool ranked_ = false;
  size_t longest_ = 0;          // of `pieces_`, in bytes
  PrefixMatcher user_defined_;  // pieces that are never merged nor cut
  std::array<int32_t, 256> byte_ids_{};
};

}  // namespace mixtral
