#include "bpe.h"

#include <algorithm>
#include <cstring>

#include "../io/utf8.h"

namespace mixtral {
namespace {

constexpr int32_t kNoPiece = -1;
constexpr uint32_t kNone = UINT32_MAX;

uint64_t pair_key(int64_t left, int64_t right) {
  return static_cast<uint64_t>(left) << 32 | static_cast<uint64_t>(static_cast<uint32_t>(right));
}

// Two neighbours that may merge. It is out of date once either has merged: then their size differs.
struct Candidate {
  uint64_t order;  // the least goes first: by cost, then from left to right
  uint32_t size;   // of both, in bytes
  int32_t id;      // of the piece they become

  uint32_t left() const { return static_cast<uint32_t>(order); }
  bool operator<(const Candidate& other) const { return order > other.order; }  // the top of a heap is its greatest
};

// In one number, which compares faster than two.
uint64_t order_of(float cost, uint32_t left) {
  cost += 0.0F;  // -0 becomes +0
  uint32_t bits = 0;
  std::memcpy(&bits, &cost, sizeof bits);
  bits = bits >> 31 != 0 ? ~bits : bits | 1U << 31;  // integers in the order of the floats
  return static_cast<uint64_t>(bits) << 32 | left;
}

}  // namespace

// A list in one vector: merging keeps the left symbol and drops the right one, whose size becomes 0.
struct Bpe::Symbol {
  uint32_t begin, size;
  uint32_t previous, next;
  int32_t id;
  bool frozen;
};

Bpe::Bpe(const std::vector<SentencePiece>& pieces, const Vocabulary& vocabulary) : ranked_(vocabulary.ranked) {
  pieces_.max_load_factor(0.5F);
  merges_.max_load_factor(0.5F);
  if (!ranked_) pieces_.reserve(pieces.size());
  merges_.reserve(vocabulary.merges.size());
  std::vector<PrefixMatcher::Entry> user_defined;
  for (size_t i = 0; i < pieces.size(); ++i) {
    const SentencePiece& piece = pieces[i];
    const auto id = static_cast<int32_t>(i);
    if (piece.type == PieceType::kByte) byte_ids_[static_cast<size_t>(byte_value(piece.text))] = id;
    if (piece.type == PieceType::kUserDefined) user_defined.push_back({piece.text, id});
    if (piece.type != PieceType::kNormal && piece.type != PieceType::kUserDefined) continue;
    if (ranked_ && utf8_prefix(piece.text).length < piece.text.size()) continue;  // only `merges_` make it
    pieces_[piece.text] = {-piece.score, id};
    longest_ = std::max(longest_, piece.text.size());
  }
  user_defined_ = PrefixMatcher(std::move(user_defined));
  // A merge from or to any other piece would let text become a control token.
  const auto is_text = [&](int64_t id) { return pieces[static_cast<size_t>(id)].type == PieceType::kNormal; };
  for (size_t rank = 0; rank < vocabulary.merges.size(); ++rank) {
    const Merge& merge = vocabulary.merges[rank];
    if (!is_text(merge.left) || !is_text(merge.right) || !is_text(merge.result)) continue;
    merges_[pair_key(merge.left, merge.right)] = {static_cast<float>(rank), merge.result};
  }
}

Bpe::Joined Bpe::joined(std::string_view text, const Symbol& left, const Symbol& right) const {
  if (left.frozen || right.frozen) return {};
  if (ranked_) {
    const auto found = merges_.find(pair_key(left.id, right.id));
    return found == merges_.end() ? Joined{} : found->second;
  }
  const size_t size = left.size + right.size;
  if (size > longest_) return {};
  const auto found = pieces_.find(text.substr(left.begin, size));
  return found == pieces_.end() ? Joined{} : found->second;
}

std::vector<Bpe::Symbol> Bpe::symbols_of(std::string_view text) const {
  std::vector<Symbol> symbols;
  symbols.reserve(text.size());
  const auto add = [&](size_t begin, size_t size, int32_t id, bool frozen) {
    const auto index = static_cast<uint32_t>(symbols.size());
    symbols.push_back({static_cast<uint32_t>(begin), static_cast<uint32_t>(size), index == 0 ? kNone : index - 1,
                       index + 1, id, frozen});
  };
  for (size_t i = 0; i < text.size();) {
    if (const PrefixMatcher::Match match = user_defined_.longest(text.substr(i)); match.length > 0) {
      add(i, match.length, static_cast<int32_t>(match.value), true);
      i += match.length;
      continue;
    }
    const Utf8Prefix prefix = utf8_prefix(text.substr(i));
    const bool whole = prefix.kind == Utf8Prefix::kWhole;
    const size_t size = whole ? prefix.length : 1;
    const auto found = whole ? pieces_.find(text.substr(i, size)) : pieces_.end();
    const int32_t id = found == pieces_.end() ? kNoPiece : found->second.id;
    // By scores, characters without a piece of their own may still be part of a longer one.
    add(i, size, id, !whole || (ranked_ && id == kNoPiece));
    i += size;
  }
  if (!symbols.empty()) symbols.back().next = kNone;
  return symbols;
}

void Bpe::encode(std::string_view text, std::vector<int64_t>& ids) const {
  std::vector<Symbol> symbols = symbols_of(text);
  std::vector<Candidate> candidates;  // a heap
  const auto consider = [&](uint32_t left) {
    if (left == kNone || symbols[left].next == kNone) return false;
    const Symbol &a = symbols[left], &b = symbols[symbols[left].next];
    const Joined piece = joined(text, a, b);
    if (piece.id >= 0) candidates.push_back({order_of(piece.cost, left), a.size + b.size, piece.id});
    return piece.id >= 0;
  };
  for (uint32_t i = 0; i < symbols.size(); ++i) consider(i);
  std::make_heap(candidates.begin(), candidates.end());
  while (!candidates.empty()) {
    const Candidate best = candidates.front();
    std::pop_heap(candidates.begin(), candidates.end());
    candidates.pop_back();
    Symbol& left = symbols[best.left()];
    if (left.size == 0 || left.next == kNone) continue;
    Symbol& right = symbols[left.next];
    if (left.size + right.size != best.size) continue;
    left.size = best.size;
    left.id = best.id;
    left.next = right.next;
    right.size = 0;
    if (left.next != kNone) symbols[left.next].previous = best.left();
    for (const uint32_t first : {left.previous, best.left()}) {
      if (consider(first)) std::push_heap(candidates.begin(), candidates.end());
    }
  }
  for (uint32_t i = symbols.empty() ? kNone : 0; i != kNone; i = symbols[i].next) {
    const Symbol& symbol = symbols[i];
    if (symbol.id != kNoPiece) {
      ids.push_back(symbol.id);
    } else {
      for (const char c : text.substr(symbol.begin, symbol.size)) ids.push_back(byte_ids_[static_cast<uint8_t>(c)]);
    }
  }
}

}  // namespace mixtral
