#include "tokenizer_json_reader.h"

#include "../io/json.h"
#include "../io/load_error.h"
#include "vocabulary.h"

namespace mixtral {
namespace {

using nlohmann::json;

constexpr size_t kMaxMerges = size_t{1} << 19;
constexpr size_t kMaxValues = size_t{1} << 17;  // of everything else that is kept
constexpr size_t kMaxDepth = 64;

class Reader : public JsonEvents {
 public:
  explicit Reader(const std::string& file) : JsonEvents(file), file_(file) {}

  bool null() override { return value(nullptr); }
  bool boolean(bool value) override { return this->value(value); }
  bool number_integer(int64_t number) override { return whole_number(number); }
  bool number_unsigned(uint64_t number) override {
    if (number > INT64_MAX) return value(number);
    return whole_number(static_cast<int64_t>(number));
  }
  bool number_float(double number, const std::string&) override { return value(number); }
  bool binary(json::binary_t&) override { return true; }

  bool string(std::string& text) override {
    if (place_ == Place::kMerges && depth_ == 3) {
      const size_t space = text.find(' ');
      if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) bad_merge();
      add_half(std::string_view(text).substr(0, space));
      add_half(std::string_view(text).substr(space + 1));
      return true;
    }
    if (place_ == Place::kMerges && depth_ == 4) {
      if (half_ == 2) bad_merge();
      add_half(text);
      ++half_;
      return true;
    }
    return value(std::move(text));
  }

  bool key(std::string& key) override {
    if (place_ == Place::kVocabulary) {
      piece_ = std::move(key);
      return true;
    }
    if (skipped_ != 0) return true;
    if (depth_ == 1 && !is_needed(key)) {
      skipped_ = depth_;
      return true;
    }
    key_ = std::move(key);
    if (open_.back()->contains(key_)) throw LoadError(file_, key_, "key occurs twice");
    return true;
  }

  bool start_object(size_t) override { return open(json::object()); }
  bool start_array(size_t) override { return open(json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }

  TokenizerJson take() { return std::move(result_); }

 private:
  enum class Place { kElsewhere, kVocabulary, kMerges };

  // Keys of the file that say how text becomes ids.
  static bool is_needed(const std::string& key) {
    return key == "model" || key == "added_tokens" || key == "normalizer" || key == "pre_tokenizer";
  }

  [[noreturn]] void bad_merge() const {
    throw LoadError(file_, "merge " + std::to_string((result_.merge_ends.size() - half_) / 2),
                    "must be two pieces: \"a b\" or [\"a\", \"b\"]");
  }

  [[noreturn]] void bad_piece(const std::string& piece) const {
    throw LoadError(file_, "vocab: " + piece, "the id must be a whole number");
  }

  void add_half(std::string_view text) {
    if (text.empty()) bad_merge();
    if (result_.merge_count() == kMaxMerges) throw LoadError(file_, "merges", "must be at most 2^19");
    result_.merge_text += text;
    result_.merge_ends.push_back(static_cast<uint32_t>(result_.merge_text.size()));
  }

  bool whole_number(int64_t number) {
    if (place_ != Place::kVocabulary) return value(number);
    if (result_.vocabulary.size() == kMaxTokens) throw LoadError(file_, "vocab", "must have at most 2^18 pieces");
    result_.vocabulary.emplace_back(std::move(piece_), number);
    return true;
  }

  // A value that is no container, outside vocabulary and merges.
  bool value(json value) {
    if (place_ == Place::kVocabulary) bad_piece(piece_);
    if (place_ == Place::kMerges) bad_merge();
    if (skipped_ != 0) {
      if (skipped_ == depth_) skipped_ = 0;  // the skipped key had a plain value
      return true;
    }
    put(std::move(value));
    return true;
  }

  json* put(json value) {
    if (++values_ > kMaxValues) throw LoadError(file_, "", "holds more than 2^17 values beside vocabulary and merges");
    if (open_.empty()) return &(result_.rest = std::move(value));
    json& parent = *open_.back();
    if (parent.is_object()) return &(parent[key_] = std::move(value));
    parent.push_back(std::move(value));
    return &parent.back();
  }

  bool open(json container) {
    if (++depth_ > kMaxDepth) throw LoadError(file_, "", "JSON is nested deeper than 64 levels");
    if (place_ == Place::kVocabulary) bad_piece(piece_);
    if (place_ == Place::kMerges) {
      if (depth_ != 4 || !container.is_array()) bad_merge();
      return true;
    }
    if (skipped_ != 0) return true;
    if (depth_ == 3 && in_model_ && key_ == "vocab" && container.is_object()) place_ = Place::kVocabulary;
    if (depth_ == 3 && in_model_ && key_ == "merges" && container.is_array()) place_ = Place::kMerges;
    if (depth_ == 2) in_model_ = key_ == "model";
    open_.push_back(put(std::move(container)));
    return true;
  }

  bool close() {
    --depth_;
    if (place_ == Place::kMerges && depth_ == 3) {
      if (half_ != 2) bad_merge();
      half_ = 0;
      return true;
    }
    if (skipped_ != 0) {
      if (skipped_ == depth_) skipped_ = 0;
      return true;
    }
    place_ = Place::kElsewhere;
    open_.pop_back();
    return true;
  }

  const std::string& file_;
  TokenizerJson result_;
  std::vector<json*> open_;  // containers being read that are kept. An array never grows while one of its values is.
  std::string key_;          // of the value to come
  size_t depth_ = 0;         // containers being read
  size_t skipped_ = 0;       // the depth of a key that is not needed, while its value is read
  size_t values_ = 0;
  bool in_model_ = false;
  Place place_ = Place::kElsewhere;
  std::string piece_;  // in the vocabulary: its key
  size_t half_ = 0;    // in the merges: texts of the pair so far
};

}  // namespace

TokenizerJson read_tokenizer_json(const std::string& text, const std::string& file) {
  Reader reader(file);
  read_json_events(text, file, reader);
  return reader.take();
}

}  // namespace mixtral
