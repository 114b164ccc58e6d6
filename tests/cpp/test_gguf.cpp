#include "checkpoint_files.h"
#include "io/ggml_type.h"
#include "io/gguf.h"
#include "little_endian.h"

namespace mixtral {
namespace {

using testing::bytes_of;
using testing::expect_load_error;
using testing::peak_memory;
using testing::replaced;
using testing::TempFolder;
using testing::write_file;
using namespace std::string_literals;

enum : uint32_t { kU8, kI8, kU16, kI16, kU32, kI32, kF32, kBool, kText, kArray, kU64, kI64, kF64 };

std::string text(const std::string& value) { return bytes_of<uint64_t>(value.size()) + value; }

std::string entry(const std::string& key, uint32_t type, const std::string& value) {
  return text(key) + bytes_of(type) + value;
}

std::string array(uint32_t type, uint64_t count, const std::string& values) {
  return bytes_of(type) + bytes_of(count) + values;
}

// Dimensions in the order of the file: the first is contiguous.
std::string info(const std::string& name, const std::vector<uint64_t>& sizes, uint32_t type, uint64_t offset) {
  std::string bytes = text(name) + bytes_of(static_cast<uint32_t>(sizes.size()));
  for (const uint64_t size : sizes) bytes += bytes_of(size);
  return bytes + bytes_of(type) + bytes_of(offset);
}

std::string gguf(const std::vector<std::string>& metadata, const std::vector<std::string>& infos,
                 const std::string& data, uint32_t version = 3, size_t alignment = 32) {
  std::string bytes =
      "GGUF" + bytes_of(version) + bytes_of<uint64_t>(infos.size()) + bytes_of<uint64_t>(metadata.size());
  for (const std::string& part : metadata) bytes += part;
  for (const std::string& part : infos) bytes += part;
  bytes.append((alignment - bytes.size() % alignment) % alignment, '\0');
  return bytes + data;
}

const std::vector<std::string> kMetadata = {entry("u8", kU8, "\xff"),
                                            entry("i8", kI8, "\xff"),
                                            entry("u16", kU16, "\xff\xff"),
                                            entry("i16", kI16, "\xff\xff"),
                                            entry("u32", kU32, "\xff\xff\xff\xff"),
                                            entry("i32", kI32, "\xff\xff\xff\xff"),
                                            entry("f32", kF32, bytes_of(0.5f)),
                                            entry("bool", kBool, "\x01"),
                                            entry("text", kText, text("hello")),
                                            entry("u64", kU64, bytes_of(INT64_MAX)),
                                            entry("i64", kI64, bytes_of(INT64_MIN)),
                                            entry("f64", kF64, bytes_of(0.1)),
                                            entry("texts", kArray, array(kText, 3, text("a") + text("") + text("ccc"))),
                                            entry("floats", kArray, array(kF32, 2, bytes_of(1.0f) + bytes_of(-2.0f))),
                                            entry("ints", kArray, array(kI32, 2, bytes_of(7) + bytes_of(-8)))};
const std::vector<std::string> kInfos = {info("a", {3, 2}, 1, 0), info("b", {32}, 8, 32)};
const std::string kData = "abcdefghijkl" + std::string(20, '\0') + "xxABCDEFGHIJKLMNOPQRSTUVWXYZ012345";

void expect_rejected(const std::string& bytes, const std::string& part) {
  const TempFolder folder;
  write_file(folder / "m.gguf", bytes);
  expect_load_error([&] { open_gguf(folder / "m.gguf"); }, part);
}

std::string read(const TensorFile& file, const std::string& name) {
  const TensorEntry& found = file.entries().at(name);
  std::string data(found.end - found.begin, '\0');
  file.read(found.begin, data.data(), data.size());
  return data;
}

TEST(Gguf, ReadsTensors) {
  const TempFolder folder;
  for (const uint32_t version : {2u, 3u}) {
    write_file(folder / "m.gguf", gguf(kMetadata, kInfos, kData, version));
    const GgufFile file = open_gguf(folder / "m.gguf");
    ASSERT_EQ(file.tensors.entries().size(), 2u);
    EXPECT_EQ(file.tensors.entries().at("a").dtype, "F16");
    EXPECT_EQ(file.tensors.entries().at("a").shape, (std::vector<int64_t>{2, 3}));
    EXPECT_EQ(read(file.tensors, "a"), "abcdefghijkl");
    EXPECT_EQ(file.tensors.entries().at("b").dtype, "Q8_0");
    EXPECT_EQ(file.tensors.entries().at("b").shape, (std::vector<int64_t>{32}));
    EXPECT_EQ(read(file.tensors, "b"), kData.substr(32));
  }
}

TEST(Gguf, ReadsMetadataOfEveryType) {
  const TempFolder folder;
  write_file(folder / "m.gguf", gguf(kMetadata, {}, ""));
  const GgufFile file = open_gguf(folder / "m.gguf");
  EXPECT_EQ(file.integer("u8"), 255);
  EXPECT_EQ(file.integer("u16"), 65535);
  EXPECT_EQ(file.integer("u32"), 4294967295);
  for (const char* key : {"i8", "i16", "i32"}) EXPECT_EQ(file.integer(key), -1);
  EXPECT_EQ(file.integer("u64"), INT64_MAX);
  EXPECT_EQ(file.integer("i64"), INT64_MIN);
  EXPECT_EQ(file.number("f32"), 0.5);
  EXPECT_EQ(file.number("f64"), 0.1);
  EXPECT_EQ(file.text("text"), "hello");
  EXPECT_EQ(file.find("bool")->integer, 1);
  EXPECT_EQ(file.texts("texts"), (std::vector<std::string>{"a", "", "ccc"}));
  EXPECT_EQ(file.numbers("floats"), (std::vector<float>{1, -2}));
  EXPECT_EQ(file.integers("ints"), (std::vector<int32_t>{7, -8}));
  EXPECT_EQ(file.integer("none", 3), 3);
  expect_load_error([&] { file.integer("none"); }, "none: is missing");
  expect_load_error([&] { file.integer("text", 3); }, "text: must be an integer");
  expect_load_error([&] { file.text("u8"); }, "u8: must be a text");
  expect_load_error([&] { file.number("bool"); }, "bool: must be a float");
  expect_load_error([&] { file.texts("floats"); }, "floats: must be an array of texts");
  expect_load_error([&] { file.numbers("ints"); }, "ints: must be an array of f32");
  expect_load_error([&] { file.integers("u8"); }, "u8: must be an array of i32");
}

TEST(Gguf, AlignsTheDataAsTheFileSays) {
  const TempFolder folder;
  const auto aligned = [](uint32_t alignment, uint64_t second) {
    return gguf({entry("general.alignment", kU32, bytes_of(alignment))},
                {info("a", {3}, 24, 0), info("b", {3}, 24, second)}, "123" + std::string(second - 3, '\0') + "456", 3,
                alignment);
  };
  for (const uint32_t alignment : {4u, 64u}) {
    write_file(folder / "m.gguf", aligned(alignment, alignment));
    EXPECT_EQ(read(open_gguf(folder / "m.gguf").tensors, "b"), "456");
  }
  expect_rejected(aligned(4, 8), "b: must begin at byte 4 of the data, got 8");
  for (const std::string& value :
       {entry("general.alignment", kU32, bytes_of(0)), entry("general.alignment", kU32, bytes_of(24)),
        entry("general.alignment", kU32, bytes_of(0x80000000)), entry("general.alignment", kText, text("32"))}) {
    expect_rejected(gguf({value}, {}, ""), "general.alignment: must be a power of two");
  }
}

TEST(Gguf, RejectsBadHeaders) {
  const std::string valid = gguf(kMetadata, kInfos, kData);
  expect_rejected("", "is empty: download it again");
  expect_rejected("version https://git-lfs.github.com/spec/v1", "is a git-lfs pointer");
  expect_rejected("GGUX" + valid.substr(4), "is not a GGUF file");
  for (const uint32_t version : {0u, 1u, 4u, 0x03000000u}) {
    expect_rejected(gguf({}, {}, "", version),
                    "GGUF version must be 2 or 3, little-endian, got " + std::to_string(version));
  }
  const auto counts = [](uint64_t tensors, uint64_t metadata) {
    return "GGUF" + bytes_of(3) + bytes_of(tensors) + bytes_of(metadata);
  };
  expect_rejected(counts(65537, 0), "must hold at most 65536 tensors");
  expect_rejected(counts(~uint64_t{0}, 0), "must hold at most 65536 tensors");
  expect_rejected(counts(0, 65537), "must hold at most 65536 metadata entries");
  expect_rejected(counts(1, 0), "ends within its header");
  expect_rejected(counts(0, 1), "ends within its header");
}

TEST(Gguf, RejectsBadMetadata) {
  const int64_t before = peak_memory();
  const auto rejected = [](const std::string& metadata, const std::string& part) {
    expect_rejected(gguf({metadata}, {}, ""), part);
  };
  rejected(entry("k", 13, ""), "the type of a value must be 0 to 12, got 13");
  rejected(entry("k", kU64, bytes_of(~uint64_t{0})), "must be below 2^63");
  rejected(entry("\xff", kU8, "1"), "a name must be UTF-8");
  expect_rejected(gguf({entry("k", kU8, "1"), entry("k", kU8, "1")}, {}, ""), "k: occurs twice");
  for (const uint64_t size : {uint64_t{1} << 20, uint64_t{1} << 40, uint64_t{1} << 63, ~uint64_t{0}}) {
    const char* const expected = size == 1 << 20 ? "ends within its header" : "must have at most 1048576 bytes";
    rejected(entry("k", kText, bytes_of(size)), expected);
    rejected(entry("k", kArray, array(kText, 1, bytes_of(size))), "ends within its header");
    rejected(entry("k", kArray, array(kText, size, "")), "ends within its header");
    rejected(entry("k", kArray, array(kF64, size, "")), "ends within its header");
    rejected(entry("k", kArray, array(kU8, size, "")), "ends within its header");
  }
  rejected(bytes_of(~uint64_t{0}), "must have at most 65535 bytes");
  rejected(entry("k", kArray, array(kArray, 1, array(kU8, 1, "1"))), "an array must hold texts, numbers or booleans");
  rejected(entry("k", kArray, array(99, 1, "1")), "an array must hold texts, numbers or booleans");
  EXPECT_LT(peak_memory() - before, 16 << 20);
  std::vector<std::string> large(40, entry("k", kText, text(std::string(1 << 20, 'x'))));
  for (size_t i = 0; i < large.size(); ++i) large[i][8] = static_cast<char>('0' + i);
  expect_rejected(gguf(large, {}, ""), "all texts must have at most 32 MiB");
}

TEST(Gguf, ReadsNoMoreTextsThanAVocabularyMayHave) {
  const TempFolder folder;
  for (const uint64_t count : {uint64_t{1} << 18, (uint64_t{1} << 18) + 1}) {
    write_file(folder / "m.gguf",
               gguf({entry("k", kArray, array(kText, count, std::string(8 * count, '\0')))}, {}, ""));
    const GgufFile file = open_gguf(folder / "m.gguf");
    if (count == 1 << 18) {
      EXPECT_EQ(file.texts("k").size(), count);
    } else {
      expect_load_error([&] { file.texts("k"); }, "k: must have at most 2^18 texts");
    }
  }
}

TEST(Gguf, RejectsBadTensors) {
  const auto rejected = [](const std::vector<std::string>& infos, const std::string& part) {
    expect_rejected(gguf({}, infos, kData), part);
  };
  rejected({info("a", {1, 1, 1, 1, 1}, 0, 0)}, "a: must have at most 4 dimensions, got 5");
  rejected({info("a", {uint64_t{1} << 63}, 24, 0)}, "a: a size must be below 2^63");
  rejected({info("a", {1}, 4, 0)}, "a: has the type 4, which is not known");
  rejected({info("a", {1}, 99, 0)}, "a: has the type 99, which is not known");
  rejected({info("a", {48}, 8, 0)}, "a: Q8_0 needs rows of whole blocks of 32 elements, got 48");
  rejected({info("a", {8, 4}, 8, 0)}, "a: Q8_0 needs rows of whole blocks of 32 elements, got 8");
  rejected({info("a", {}, 8, 0)}, "a: Q8_0 needs rows of whole blocks");
  rejected({info("a", {1}, 0, 32)}, "a: must begin at byte 0 of the data, got 32");
  rejected({info("a", {3, 2}, 1, 0), info("b", {1}, 24, 12)}, "b: must begin at byte 32 of the data, got 12");
  rejected({info("a", {1}, 24, 0), info("a", {1}, 24, 32)}, "a: occurs twice");
  for (const auto& sizes : std::vector<std::vector<uint64_t>>{
           {uint64_t{1} << 62, 2}, {uint64_t{1} << 32, uint64_t{1} << 32}, {uint64_t{1} << 61}, {67, 1, 1}}) {
    rejected({info("a", sizes, 0, 0)}, "a: must lie within the file");
  }
  rejected({info("a", {67}, 24, 0)}, "a: must lie within the file");
  rejected({info("a", {1}, 24, ~uint64_t{0})}, "a: must lie within the file");
}

TEST(Gguf, FindsTheFileOfAFolder) {
  const TempFolder folder;
  EXPECT_EQ(find_gguf(folder.path()), "");
  EXPECT_EQ(find_gguf(folder / "absent"), "");
  write_file(folder / "blob", "GGUF");
  EXPECT_EQ(find_gguf(folder / "blob"), folder / "blob");
  EXPECT_EQ(find_gguf(folder.path()), "");
  write_file(folder / "a.gguf", "GGU");
  EXPECT_EQ(find_gguf(folder / "a.gguf"), folder / "a.gguf");
  EXPECT_EQ(find_gguf(folder.path()), folder / "a.gguf");
  write_file(folder / "b.gguf", "");
  expect_load_error([&] { find_gguf(folder.path()); }, "holds several .gguf files: name one of them");
}

TEST(Gguf, SurvivesEveryTruncationAndBitFlip) {
  const TempFolder folder;
  const auto path = folder / "m.gguf";
  const std::string valid = gguf(kMetadata, kInfos, kData);
  testing::expect_damage_survived(path, valid, kData.size(), [&] {
    const GgufFile file = open_gguf(path);
    for (const auto& [name, found] : file.tensors.entries()) {
      const std::string data = read(file.tensors, name);
      std::vector<float> out(1024);
      if (is_ggml_quantized(found.dtype)) {
        dequantize_ggml(found.dtype, reinterpret_cast<const uint8_t*>(data.data()), found.shape.back(), out.data());
      }
    }
    for (const char* key : {"texts", "floats", "ints"}) {
      try {  // a key holds one of the three kinds, and the others are refused
        file.texts(key);
        file.numbers(key);
        file.integers(key);
      } catch (const LoadError&) {
      }
    }
  });
}

}  // namespace
}  // namespace mixtral
