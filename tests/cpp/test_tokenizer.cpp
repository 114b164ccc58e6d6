// Tokenizer files, text and chat on a small hand-made vocabulary. Equality with mistral-common on the real vocabularies
// is tested from Python.
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <random>

#include "io/load_error.h"
#include "io/utf8.h"
#include "text/chat.h"
#include "text/sentencepiece_file.h"
#include "text/tokenizer.h"

namespace mixtral {
namespace {

// ---- a SentencePiece model file, byte by byte

std::string varint(uint64_t value) {
  std::string out;
  for (; value >= 0x80; value >>= 7) out += static_cast<char>(value | 0x80);
  return out + static_cast<char>(value);
}

std::string number_field(int number, uint64_t value) { return varint(number * 8) + varint(value); }
std::string bytes_field(int number, const std::string& bytes) {
  return varint(number * 8 + 2) + varint(bytes.size()) + bytes;
}

std::string piece_message(const std::string& text, float score, int type) {
  std::string bits(4, '\0');
  std::memcpy(bits.data(), &score, 4);
  return bytes_field(1, text) + varint(2 * 8 + 5) + bits + number_field(3, type);
}

struct ModelFile {
  std::vector<std::string> pieces;
  std::string trainer = number_field(3, 2) + number_field(35, 1);
  std::string normalizer = bytes_field(1, "identity") + bytes_field(2, "") + number_field(3, 1) + number_field(4, 0);
  std::string more;

  std::string bytes() const {
    std::string out;
    for (const std::string& piece : pieces) out += bytes_field(1, piece);
    return out + bytes_field(2, trainer) + bytes_field(3, normalizer) + more;
  }
};

// Ids: 0 <unk>, 1 <s>, 2 </s>, then `controls`, then the 256 bytes, then text.
ModelFile small_model(const std::vector<std::string>& controls = {}) {
  ModelFile model;
  model.pieces = {piece_message("<unk>", 0, 2), piece_message("<s>", 0, 3), piece_message("</s>", 0, 3)};
  for (const std::string& control : controls) model.pieces.push_back(piece_message(control, 0, 3));
  for (int i = 0; i < 256; ++i) {
    char text[8];
    std::snprintf(text, sizeof text, "<0x%02X>", i);
    model.pieces.push_back(piece_message(text, 0, 6));
  }
  float score = 0;
  for (const char* text : {"▁a", "ab", "▁", "a", "b", "é", "<", "s", ">", "/", "[", "]"}) {
    model.pieces.push_back(piece_message(text, --score, 1));
  }
  return model;
}

class TokenizerTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = std::filesystem::temp_directory_path() / ("mixtral_tokenizer_" + std::to_string(std::random_device{}()));
    std::filesystem::create_directory(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::filesystem::path write(const std::string& bytes, const std::string& name = "tokenizer.model") {
    std::ofstream(folder_ / name, std::ios::binary) << bytes;
    return folder_ / name;
  }
  Tokenizer load(const ModelFile& model) { return Tokenizer(write(model.bytes())); }

  std::string load_error(const std::string& bytes) {
    try {
      Tokenizer tokenizer(write(bytes));
    } catch (const LoadError& error) {
      return error.item() + ": " + error.reason();
    }
    return "loads";
  }

  std::filesystem::path folder_;
};

// ---- text

TEST_F(TokenizerTest, EncodesByMergingTheBestPairAndMarksTheBeginning) {
  const Tokenizer tokenizer = load(small_model());
  const auto id = [&](const std::string& piece) {
    for (int64_t i = 0; i < tokenizer.vocab_size(); ++i) {
      if (tokenizer.piece(i) == piece) return i;
    }
    return int64_t{-1};
  };
  EXPECT_EQ(tokenizer.encode("ab a"), (std::vector<int64_t>{id("▁a"), id("b"), id("▁a")}));
  EXPECT_EQ(tokenizer.encode("bab"), (std::vector<int64_t>{id("▁"), id("b"), id("ab")}));
  EXPECT_EQ(tokenizer.encode("b", true, true), (std::vector<int64_t>{1, id("▁"), id("b"), 2}));
  EXPECT_EQ(tokenizer.encode(""), std::vector<int64_t>{});
  EXPECT_EQ(tokenizer.encode("", true), std::vector<int64_t>{1});
}

TEST_F(TokenizerTest, ControlTokensAreNeverReadFromText) {
  const Tokenizer tokenizer = load(small_model({"[INST]", "[/INST]"}));
  for (const int64_t id : tokenizer.encode("<s>[INST] a</s>[/INST]<unk><0x41>")) {
    EXPECT_FALSE(tokenizer.is_control(id)) << tokenizer.piece(id);
  }
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("<s>[INST] a</s><0x41>")), "<s>[INST] a</s><0x41>");
}

TEST_F(TokenizerTest, EveryValidTextComesBack) {
  const Tokenizer tokenizer = load(small_model());
  const std::vector<std::string> texts = {
      "",  " ",       "  ",     " a ",   "ab\n\tab", std::string("a\0b\0", 4), "é", "日本語",
      "𓀀", "\uFEFFa", "\uFFFD", "a\r\n", "\x7f",     "👩‍👩‍👧",     "\n"};
  for (const std::string& text : texts) EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), text);
  const std::string letters(1 << 20, 'a');
  EXPECT_EQ(tokenizer.decode(tokenizer.encode(letters)), letters);
}

TEST_F(TokenizerTest, InvalidBytesBecomeByteTokens) {
  const Tokenizer tokenizer = load(small_model());
  const auto byte_id = [](int byte) { return int64_t{3} + byte; };
  // In front of text, inside, at its end; overlong, surrogate, cut, too large; next to the code point U+FFFD itself.
  const std::vector<std::string> texts = {"\xFF",
                                          "\xFF"
                                          "ab",
                                          "ab\xFF",
                                          "a\xC0\x80"
                                          "b",
                                          "\xED\xA0\x80",
                                          "\xF0\x9F\x92",
                                          "\xF4\x90\x80\x80",
                                          "\uFFFD\xEF\xBF",
                                          "é\xC3"
                                          "é",
                                          "\x80 \x80"};
  for (const std::string& text : texts) {
    std::string bytes;
    for (const int64_t id : tokenizer.encode(text)) {
      ASSERT_FALSE(tokenizer.is_control(id));
      bytes += tokenizer.is_byte(id) ? std::string(1, static_cast<char>(id - byte_id(0))) : tokenizer.piece(id);
    }
    std::string expected = "▁";  // the space before the text; U+FFFD has no piece here and is bytes as well
    for (const char c : text) expected += c == ' ' ? "▁" : std::string(1, c);
    EXPECT_EQ(bytes, expected);
  }
  EXPECT_EQ(tokenizer.decode({byte_id(0xE2), byte_id(0x96), byte_id('a')}), "\uFFFD\uFFFDa");
}

TEST_F(TokenizerTest, StreamedTextIsWholeCodePointsAndAddsUpToDecode) {
  const Tokenizer tokenizer = load(small_model());
  std::mt19937 random(7);
  for (int run = 0; run < 2000; ++run) {
    StreamingDecoder decoder(tokenizer);
    std::vector<int64_t> ids;
    std::string text;
    for (int i = 0; i < 12; ++i) {
      // Half of them bytes of "é", "日" and "𓀀", in any order.
      const int bytes[] = {0xC3, 0xA9, 0xE6, 0x97, 0xA5, 0xF0, 0x93, 0x80, 0x80};
      ids.push_back(random() % 2 ? 3 + bytes[random() % 9] : static_cast<int64_t>(random() % tokenizer.vocab_size()));
      const std::string piece = decoder.push(ids.back());
      ASSERT_TRUE(piece.empty() || (piece[0] & 0xC0) != 0x80) << "starts inside a code point";
      text += piece;
    }
    text += decoder.flush();
    ASSERT_EQ(text, tokenizer.decode(ids));
  }
  StreamingDecoder decoder(tokenizer);
  for (const int byte : {0xF0, 0x93, 0x80}) EXPECT_EQ(decoder.push(3 + byte), "");
  EXPECT_EQ(decoder.push(3 + 0x80), "𓀀");
  EXPECT_EQ(decoder.push(3 + 0xE6), "");
  EXPECT_EQ(decoder.push(3 + 0xE6), "\uFFFD");  // the first can no longer become a code point, the second can
  EXPECT_EQ(decoder.push(3 + 0x97), "");
  EXPECT_EQ(decoder.push(3 + 0xA5), "日");
  EXPECT_EQ(decoder.push(3 + 0xE6), "");
  EXPECT_EQ(decoder.flush(), "\uFFFD");
  EXPECT_EQ(decoder.flush(), "");
}

TEST_F(TokenizerTest, LeadingSpaceIsDroppedOnceUnlessTheTextContinues) {
  const Tokenizer tokenizer = load(small_model());
  const std::vector<int64_t> ids = tokenizer.encode(" a");
  EXPECT_EQ(tokenizer.decode(ids), " a");
  StreamingDecoder decoder(tokenizer, /*continues_text=*/true);
  std::string text = decoder.push(tokenizer.bos_id());
  for (const int64_t id : ids) text += decoder.push(id);
  EXPECT_EQ(text, "  a");
}

TEST_F(TokenizerTest, NegativeIdsAreRefusedAndThoseWithoutAPieceAreNothing) {
  const Tokenizer tokenizer = load(small_model());
  for (const int64_t id : {int64_t{-1}, INT64_MIN}) {
    EXPECT_THROW(tokenizer.decode({id}), std::out_of_range);
    EXPECT_THROW(tokenizer.piece(id), std::out_of_range);
    EXPECT_THROW(tokenizer.is_control(id), std::out_of_range);
  }
  for (const int64_t id : {tokenizer.vocab_size(), int64_t{INT32_MAX}, int64_t{1} << 32, INT64_MAX}) {
    EXPECT_EQ(tokenizer.decode({id}), "");
    EXPECT_EQ(tokenizer.piece(id), "");
    EXPECT_FALSE(tokenizer.is_control(id));
  }
}

TEST_F(TokenizerTest, UserDefinedPiecesAreNeitherMergedNorCut) {
  ModelFile model = small_model();
  for (int i = 2; i < 200; ++i) model.pieces.push_back(piece_message(std::string(i, 'x'), 0, 4));
  model.pieces.push_back(piece_message("ab]", 0, 4));
  model.pieces.push_back(piece_message("bxx", 0, 1));
  const Tokenizer tokenizer = load(model);
  const auto pieces = [&](const std::string& text) {
    std::vector<std::string> out;
    for (const int64_t id : tokenizer.encode(text)) out.push_back(tokenizer.piece(id));
    return out;
  };
  EXPECT_EQ(pieces("bxx"), (std::vector<std::string>{"▁", "b", "xx"}));
  EXPECT_EQ(pieces("bab]"), (std::vector<std::string>{"▁", "b", "ab]"}));
  EXPECT_EQ(pieces(std::string(203, 'x')), (std::vector<std::string>{"▁", std::string(199, 'x'), std::string(4, 'x')}));
  const std::string text(1 << 16, 'x');
  EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), text);
}

TEST_F(TokenizerTest, SamplesInTheFileAreNotEncoded) {
  ModelFile model = small_model();
  const std::string sample = bytes_field(1, std::string(1 << 20, 'a')) + bytes_field(2, "\x1b[31m");
  model.more = bytes_field(4, bytes_field(1, sample));
  EXPECT_EQ(load(model).encode("ab"), load(small_model()).encode("ab"));
}

TEST_F(TokenizerTest, ControlTokensOfTheFileAreReadWhereAsked) {
  const Tokenizer tokenizer = load(small_model({"[INST]", "[/INST]"}));
  EXPECT_EQ(tokenizer.encode("[INST]</s>", false, false, true), (std::vector<int64_t>{3, 2}));
  EXPECT_EQ(tokenizer.special_in("a[INST]b[INST]</s><unk>"), (std::vector<int64_t>{3, 2}));
}

TEST_F(TokenizerTest, AFolderAddsItsTokensToThoseOfTheFile) {
  const std::vector<int64_t> before = load(small_model()).encode("ab a");
  const int64_t size = load(small_model()).vocab_size();
  write("{\"<|e|>\": " + std::to_string(size) + ", \"<f>\": " + std::to_string(size + 1) + "}", "added_tokens.json");
  write("{\"eos_token\": \"<|e|>\"}", "tokenizer_config.json");
  const Tokenizer tokenizer(folder_);
  EXPECT_EQ(tokenizer.encode("ab a"), before);
  EXPECT_EQ(tokenizer.vocab_size(), size + 2);
  const int64_t space = tokenizer.encode("b")[0], b = tokenizer.encode("b")[1];
  EXPECT_EQ(tokenizer.encode("b<f>b<|e|>", false, false, true), (std::vector<int64_t>{space, b, size + 1, b, size}));
  EXPECT_TRUE(tokenizer.is_control(size));
  EXPECT_EQ(tokenizer.decode({size, size + 1}), "<f>");
  EXPECT_EQ(tokenizer.note(), "");
  write("{\"legacy\": true}", "tokenizer_config.json");  // a space after each added token
  EXPECT_EQ(Tokenizer(folder_).encode("<f>b"), (std::vector<int64_t>{size + 1, space, b}));
  write("not a tokenizer", "tokenizer.json");
  EXPECT_NE(Tokenizer(folder_).note().find("tokenizer.model is used, not tokenizer.json, which is not"),
            std::string::npos);
}

// ---- version and place of the file

TEST_F(TokenizerTest, VersionComesFromTheArgumentThenTheNameThenTheFile) {
  const std::vector<std::string> v2 = {"[INST]", "[/INST]"};
  const std::string v1_file = small_model().bytes(), v2_file = small_model(v2).bytes();
  const std::string v3_file = small_model({"[INST]", "[/INST]", "[IMG]"}).bytes();
  const std::string v7_file =
      small_model({"[INST]", "[/INST]", "[IMG]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"}).bytes();
  EXPECT_EQ(Tokenizer(write(v1_file)).version(), TokenizerVersion::kV1);
  EXPECT_EQ(Tokenizer(write(v2_file)).version(), TokenizerVersion::kV2);
  EXPECT_EQ(Tokenizer(write(v3_file)).version(), TokenizerVersion::kV3);
  EXPECT_EQ(Tokenizer(write(v7_file)).version(), TokenizerVersion::kV7);
  EXPECT_EQ(Tokenizer(write(v2_file, "tokenizer.model.v3")).version(), TokenizerVersion::kV3);
  EXPECT_EQ(Tokenizer(write(v7_file, "x.model.v7m1")).version(), TokenizerVersion::kV7);
  EXPECT_EQ(Tokenizer(write(v2_file, "x.model.v3"), TokenizerVersion::kV2).version(), TokenizerVersion::kV2);
  EXPECT_THROW(Tokenizer(write(v1_file), TokenizerVersion::kV3), LoadError);  // has no [INST]
  EXPECT_THROW(Tokenizer(write(v3_file), TokenizerVersion::kV7), LoadError);  // has no [SYSTEM_PROMPT]
  EXPECT_EQ(parse_tokenizer_version("v3"), TokenizerVersion::kV3);
  EXPECT_THROW(parse_tokenizer_version("v4"), std::invalid_argument);
}

TEST_F(TokenizerTest, AVersionInTheNameMustFitTheControlTokens) {
  const std::string v1_file = small_model().bytes(), v2_file = small_model({"[INST]", "[/INST]"}).bytes();
  for (const char* name : {"tokenizer.model.v3", "tokenizer.model.v7"}) {
    const Tokenizer tokenizer(write(v1_file, name));
    EXPECT_EQ(tokenizer.version(), TokenizerVersion::kV1);
    EXPECT_EQ(tokenizer.note(), std::string(name) + " holds a tokenizer of version v1, which is used");
  }
  EXPECT_EQ(Tokenizer(write(v2_file, "tokenizer.model.v1")).version(), TokenizerVersion::kV2);
  EXPECT_EQ(Tokenizer(write(v2_file, "tokenizer.model.v7")).version(), TokenizerVersion::kV2);
  EXPECT_EQ(Tokenizer(write(v2_file, "tokenizer.model.v3")).note(), "");
}

TEST_F(TokenizerTest, AFolderGivesItsNewestTokenizer) {
  EXPECT_THROW(Tokenizer{folder_}, LoadError);
  write(small_model().bytes());
  write("not a tokenizer", "tokenizer.json");
  EXPECT_EQ(Tokenizer(folder_).version(), TokenizerVersion::kV1);
  write(small_model({"[INST]", "[/INST]"}).bytes(), "tokenizer.model.v3");
  EXPECT_EQ(Tokenizer(folder_).version(), TokenizerVersion::kV3);
}

TEST_F(TokenizerTest, MissingAndSpecialFilesAreLoadErrors) {
  EXPECT_THROW(Tokenizer(folder_ / "absent"), LoadError);
  EXPECT_THROW(Tokenizer("/dev/zero"), LoadError);
  EXPECT_EQ(load_error(""), ": is empty: download it again");
  write("x");
  std::filesystem::resize_file(folder_ / "tokenizer.model", (32 << 20) + 1);
  EXPECT_THROW(Tokenizer{folder_}, LoadError);
}

// ---- untrusted files

TEST_F(TokenizerTest, UnsoundModelsAreRefusedWithTheReason) {
  struct Case {
    std::string reason;  // part of the message
    std::function<void(ModelFile&)> change;
  };
  const std::vector<Case> cases = {
      {"loads", [](ModelFile&) {}},
      {"loads", [](ModelFile& m) { m.more = bytes_field(200, "x") + number_field(6, 1); }},
      {"bytes where 0 are left", [](ModelFile& m) { m.more = "\x08"; }},
      {"varint of more than 64 bits", [](ModelFile& m) { m.more = '\x30' + std::string(9, '\xFF') + '\2'; }},
      {"varint of more than 64 bits", [](ModelFile& m) { m.more = std::string(10, '\xFF') + '\1'; }},
      {"a field of 9223372036854775807 bytes", [](ModelFile& m) { m.more = varint(10) + varint(INT64_MAX); }},
      {"wire type must be 0, 1, 2 or 5, got 3", [](ModelFile& m) { m.more = varint(9 * 8 + 3) + varint(9 * 8 + 4); }},
      {"field number", [](ModelFile& m) { m.more = number_field(0, 1); }},
      {"ModelProto must have wire type 2, got 0", [](ModelFile& m) { m.more = number_field(2, 1); }},
      {"score must have wire type 5", [](ModelFile& m) { m.pieces.back() = bytes_field(1, "x") + number_field(2, 1); }},
      {"vocabulary must not be empty", [](ModelFile& m) { m.pieces.clear(); }},
      {"occurs twice", [](ModelFile& m) { m.pieces.push_back(m.pieces.back()); }},
      {"text must not be empty", [](ModelFile& m) { m.pieces.push_back(piece_message("", 0, 1)); }},
      {"at most 1024 bytes", [](ModelFile& m) { m.pieces.push_back(piece_message(std::string(1025, 'x'), 0, 1)); }},
      {"UTF-8 without NUL", [](ModelFile& m) { m.pieces.push_back(piece_message("\xFF", 0, 1)); }},
      {"UTF-8 without NUL", [](ModelFile& m) { m.pieces.push_back(piece_message(std::string("x\0", 2), 0, 1)); }},
      {"more than one character",
       [](ModelFile& m) {
         m.pieces.push_back(piece_message("é!", 0, 3)), m.pieces.push_back(piece_message("ö", 0, 3));
       }},
      {"score must be finite", [](ModelFile& m) { m.pieces.push_back(piece_message("x", NAN, 1)); }},
      {"score must be finite", [](ModelFile& m) { m.pieces.push_back(piece_message("x", INFINITY, 1)); }},
      {"type must be 1, 2, 3, 4 or 6, got 5", [](ModelFile& m) { m.pieces.push_back(piece_message("x", 0, 5)); }},
      {"type must be 1, 2, 3, 4 or 6, got 0", [](ModelFile& m) { m.pieces.push_back(piece_message("x", 0, 0)); }},
      {"one unknown piece, got 0", [](ModelFile& m) { m.pieces[0] = piece_message("x", 0, 1); }},
      {"one unknown piece, got 2", [](ModelFile& m) { m.pieces.push_back(piece_message("x", 0, 2)); }},
      {"<s>: control token is missing", [](ModelFile& m) { m.pieces[1] = piece_message("<s>", 0, 1); }},
      {"</s>: control token is missing", [](ModelFile& m) { m.pieces[2] = piece_message("xx", 0, 3); }},
      {"must have the piece U+2581", [](ModelFile& m) { m.pieces[261] = piece_message("x", 0, 1); }},
      {"must have the piece U+2581",
       [](ModelFile& m) {
         m.pieces[261] = piece_message("x", 0, 1);
         m.pieces[0] = piece_message("▁", 0, 2);
       }},
      {"256 byte pieces, got 255", [](ModelFile& m) { m.pieces[3] = piece_message("x", 0, 1); }},
      {"a byte piece must read", [](ModelFile& m) { m.pieces[3] = piece_message("<0x0g>", 0, 6); }},
      {"model_type: must be 2 (BPE), got 1", [](ModelFile& m) { m.trainer = number_field(35, 1); }},
      {"model_type: must be 2 (BPE), got 4294967298",
       [](ModelFile& m) { m.trainer += number_field(3, (uint64_t{1} << 32) + 2); }},
      {"byte_fallback: must be true", [](ModelFile& m) { m.trainer = number_field(3, 2); }},
      {"treat_whitespace_as_suffix", [](ModelFile& m) { m.trainer += number_field(24, 1); }},
      {"unk_surface", [](ModelFile& m) { m.trainer += bytes_field(44, "\xFF"); }},
      {"name must be identity", [](ModelFile& m) { m.normalizer += bytes_field(1, "nmt_nfkc"); }},
      {"precompiled_charsmap: must be empty", [](ModelFile& m) { m.normalizer += bytes_field(2, "trie"); }},
      {"precompiled_charsmap: must be empty", [](ModelFile& m) { m.more = bytes_field(3, bytes_field(2, "trie")); }},
      {"denormalizer_spec", [](ModelFile& m) { m.more = bytes_field(5, bytes_field(2, "trie")); }},
      {"add_dummy_prefix", [](ModelFile& m) { m.normalizer += number_field(3, 0); }},
      {"remove_extra_whitespaces", [](ModelFile& m) { m.normalizer += number_field(4, 1); }},
      {"escape_whitespaces", [](ModelFile& m) { m.normalizer += number_field(5, 0); }},
  };
  for (const Case& test : cases) {
    ModelFile model = small_model();
    test.change(model);
    const std::string error = load_error(model.bytes());
    EXPECT_NE(error.find(test.reason), std::string::npos) << error << "\nexpected: " << test.reason;
  }
}

TEST_F(TokenizerTest, TooManyPiecesAreRefused) {
  ModelFile model = small_model();
  std::string bytes = model.bytes();
  for (int i = 0; i < (1 << 18); ++i) bytes += bytes_field(1, bytes_field(1, std::to_string(i)));
  EXPECT_EQ(load_error(bytes), ": must have at most 2^18 pieces");
}

TEST_F(TokenizerTest, EveryCutAndEveryFlippedBitParsesOrIsALoadError) {
  const std::string valid = small_model().bytes();
  const auto parses = [](const std::string& bytes) {
    try {
      return !parse_sentencepiece_file(bytes, "file").pieces.empty();
    } catch (const LoadError&) {
      return false;
    }
  };
  ASSERT_TRUE(parses(valid));
  for (size_t size = 0; size < valid.size(); ++size) EXPECT_FALSE(parses(valid.substr(0, size))) << size;
  int accepted = 0;
  for (size_t bit = 0; bit < 8 * valid.size(); ++bit) {
    std::string flipped = valid;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << bit % 8));
    // Most of the file is byte pieces, one like the other: the library sees what comes after them.
    if (!parses(flipped) || bit / 8 + 250 < valid.size() || load_error(flipped) != "loads") continue;
    ++accepted;
    const Tokenizer tokenizer(folder_);
    const std::string text = "ab \xFF\n<s>é";
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), "ab \uFFFD\n<s>é") << bit;
  }
  EXPECT_GT(accepted, 300);  // scores, most letters
}

TEST_F(TokenizerTest, InvalidBytesComeBackWhateverTheVocabulary) {
  // Pieces that bytes, characters and spaces might be mistaken for, and one that holds a cut of another's characters.
  ModelFile model = small_model({"[INST]", "[/INST]"});
  for (const char* text : {"\uFFFD", "\uFFFD\uFFFD", "a\uFFFD", "▁\uFFFD", "▁▁", "<0x", "0xFF>", "\u0080"}) {
    model.pieces.push_back(piece_message(text, 1, 1));
  }
  for (const char* text : {"<0xFF", "▁<", "é\u2581", " "}) model.pieces.push_back(piece_message(text, 0, 4));
  const Tokenizer tokenizer = load(model);
  std::mt19937 random(7);
  const std::vector<std::string> parts = {
      "\xFF", "\xE2", "\xE2\x96", "\x81",   "\xF0\x9F\x92", "\xC3", "\uFFFD",
      "a",    " ",    "é",        "<0xFF>", "[INST]",       "\x80", std::string(1, '\0')};
  for (int round = 0; round < 2000; ++round) {
    std::string text, expected;
    for (int i = 0; i < 8; ++i) text += parts[random() % parts.size()];
    for (std::string_view rest = text; !rest.empty();) {
      const Utf8Prefix prefix = utf8_prefix(rest);
      const bool whole = prefix.kind == Utf8Prefix::kWhole;
      const std::string_view bytes = rest.substr(0, whole ? prefix.length : 1);
      expected += !whole ? "\uFFFD" : bytes == "▁" ? " " : bytes;
      rest.remove_prefix(bytes.size());
    }
    ASSERT_EQ(tokenizer.decode(tokenizer.encode(text)), expected) << testing::PrintToString(text);
  }
}

// ---- chat

TEST_F(TokenizerTest, ChatEncodesEachTurnOnItsOwn) {
  const Tokenizer v1 = load(small_model());
  std::vector<int64_t> expected = {1};
  const auto append = [&](const std::vector<int64_t>& ids) { expected.insert(expected.end(), ids.begin(), ids.end()); };
  append(v1.encode("[INST] b\n\na [/INST]"));
  append(v1.encode("ab ", false, true));
  append(v1.encode("[INST] </s> [/INST]"));
  const std::vector<ChatMessage> messages = {{"system", "b"}, {"user", "a"}, {"assistant", "ab "}, {"user", "</s>"}};
  EXPECT_EQ(apply_chat(v1, messages), expected);

  const Tokenizer v3 = load(small_model({"[INST]", "[/INST]", "[IMG]"}));
  expected = {1, 3};
  append(v3.encode("a"));
  expected.push_back(4);
  append(v3.encode("ab", false, true));  // no trailing space
  expected.push_back(3);
  append(v3.encode("b\n\n</s>"));  // the system prompt is in the last turn
  expected.push_back(4);
  EXPECT_EQ(apply_chat(v3, messages), expected);

  std::vector<int64_t> prompt = v3.encode("a", true);
  prompt.insert(prompt.begin() + 1, 3);
  prompt.push_back(4);
  const std::vector<int64_t> answer = v3.encode("b");
  prompt.insert(prompt.end(), answer.begin(), answer.end());  // no </s>: the model goes on
  EXPECT_EQ(apply_chat(v3, {{"user", "a"}, {"assistant", "b", true}}), prompt);
}

TEST_F(TokenizerTest, ChatRefusesWhatHasNoAnswer) {
  const Tokenizer tokenizer = load(small_model());
  const auto error = [&](const std::vector<ChatMessage>& messages) -> std::string {
    try {
      apply_chat(tokenizer, messages);
    } catch (const std::invalid_argument& e) {
      return e.what();
    }
    return "encodes";
  };
  EXPECT_EQ(error({}), "chat: messages must not be empty");
  EXPECT_EQ(error({{"tool", "a"}}), "chat: message 0: role before tool must be assistant or tool, got none");
  EXPECT_EQ(error({{"user", "a"}, {"assistant", "b"}}),
            "chat: message 1: the last role must be user, or assistant with prefix, got assistant");
  EXPECT_EQ(error({{"user", "a"}, {"assistant", ""}, {"user", "a"}}),
            "chat: message 1: content of the assistant must not be empty");
  EXPECT_EQ(error({{"user", "a"}, {"assistant", "b"}, {"system", "a"}}),
            "chat: message 2: role after assistant must be user or assistant, got system");
  EXPECT_EQ(error({{"user", "a"}, {"assistant", "b", true}, {"user", "a"}}),
            "chat: message 1: prefix must be set on the last message, an assistant's, only");
  EXPECT_EQ(error({{"assistant", "a", true}}), "chat: message 0: the first role must be user or system, got assistant");
  EXPECT_EQ(error({{"user", "a"}, {"assistant", "b", true}}), "encodes");
}

}  // namespace
}  // namespace mixtral
