#include <fcntl.h>
#include <sys/stat.h>

#include "checkpoint_files.h"
#include "io/safetensors.h"

namespace mixtral {
namespace {

using testing::expect_load_error;
using testing::peak_memory;
using testing::safetensors;
using testing::TempFolder;
using testing::write_file;

const std::string kHeader =
    R"({"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},)"
    R"("b":{"dtype":"F32","shape":[],"data_offsets":[12,16]},)"
    R"("empty":{"dtype":"F32","shape":[0,7],"data_offsets":[12,12]}})";
const std::string kData = "abcdefghijklmnop";

void expect_rejected(const std::string& bytes, const std::string& part) {
  const TempFolder folder;
  write_file(folder / "m.safetensors", bytes);
  expect_load_error([&] { open_safetensors(folder / "m.safetensors"); }, part);
}

// One F32 tensor "t" whose entry is `entry`, over four data bytes.
void expect_entry_rejected(const std::string& entry, const std::string& part) {
  expect_rejected(safetensors("{\"t\":" + entry + "}", "1234"), "t: " + part);
}

TEST(Safetensors, ReadsEntriesAndBytes) {
  const TempFolder folder;
  write_file(folder / "m.safetensors", safetensors("  \n" + kHeader + "   ", kData));
  const TensorFile file = open_safetensors(folder / "m.safetensors");
  ASSERT_EQ(file.entries().size(), 3u);
  const TensorEntry& a = file.entries().at("a");
  EXPECT_EQ(a.dtype, "BF16");
  EXPECT_EQ(a.shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(a.end - a.begin, 12u);
  EXPECT_TRUE(file.entries().at("b").shape.empty());
  char bytes[4];
  file.read(file.entries().at("b").begin, bytes, 4);
  EXPECT_EQ(std::string(bytes, 4), "mnop");
}

TEST(Safetensors, ReadsEightBitFloats) {
  const TempFolder folder;
  const std::string header = R"({"t":{"dtype":"F8_E4M3","shape":[2,2],"data_offsets":[0,4]}})";
  write_file(folder / "m.safetensors", safetensors(header, "1234"));
  EXPECT_EQ(open_safetensors(folder / "m.safetensors").entries().at("t").dtype, "F8_E4M3");
}

TEST(Safetensors, RejectsBadHeaderLengths) {
  expect_rejected("", "is empty: download it again");
  for (size_t n = 1; n < 8; ++n) expect_rejected(std::string(n, 'x'), "at least 8 bytes");
  const auto with_length = [](uint64_t length) {
    std::string bytes = safetensors(kHeader, kData);
    for (int i = 0; i < 8; ++i) bytes[i] = static_cast<char>(length >> (8 * i) & 0xff);
    return bytes;
  };
  const int64_t before = peak_memory();
  for (const uint64_t length : {uint64_t{1} << 63, ~uint64_t{0}, (uint64_t{16} << 20) + 1}) {
    expect_rejected(with_length(length), "header cannot have " + std::to_string(length) + " bytes");
  }
  expect_rejected(with_length(16 << 20), "is cut short: must have 16777224 bytes, got ");
  EXPECT_LT(peak_memory() - before, 1 << 20);
  expect_rejected(with_length(0), "is not a JSON object");
  expect_rejected(with_length(kHeader.size() + 1), "not valid JSON");
  expect_rejected(with_length(kHeader.size() - 1), "not valid JSON");
}

TEST(Safetensors, SaysWhatAFileIsThatIsNoSafetensors) {
  const std::string pages[] = {"<!DOCTYPE html><p>401</p>", "\n  <html><body>", "<?xml version='1.0'?><Error>"};
  for (const std::string& page : pages) expect_rejected(page, "is a web page, not the file itself");
  expect_rejected("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "git lfs pull");
  expect_rejected(std::string("GGUF\x03\0\0\0\0\0\0\0", 12), "is a GGUF file");
  expect_rejected("PK\x03\x04 and more", "is a zip archive");
  for (const char* pickle : {"\x80\x02}q\x01.....", "\x80\x04\x95\x10....."})
    expect_rejected(pickle, "is a Python pickle");
  expect_rejected(R"({"weight_map": {}})", "is no safetensors file");
}

// Header lengths whose bytes look like the beginning of a pickle.
TEST(Safetensors, TakesNoHeaderLengthForAPickle) {
  const TempFolder folder;
  for (const size_t length : {0x280, 0x480}) {
    const std::string bytes = safetensors(kHeader + std::string(length - kHeader.size(), ' '), kData);
    ASSERT_EQ(bytes[0], '\x80');
    write_file(folder / "m.safetensors", bytes);
    EXPECT_EQ(open_safetensors(folder / "m.safetensors").entries().size(), 3u);
  }
}

TEST(Safetensors, RejectsBadJson) {
  const auto rejected = [](const std::string& header, const std::string& part) {
    expect_rejected(safetensors(header, ""), part);
  };
  rejected("[]", "is not a JSON object");
  rejected("\xef\xbb\xbf{}", "is not a JSON object");
  rejected("{} {}", "is not valid JSON");
  rejected(std::string("{}\0", 3), "is not a JSON object");
  rejected("{\"\xff\":1}", "is not valid JSON");
  rejected("{\"a\":1e999}", "number out of range");
  rejected("{\"a\":NaN}", "is not valid JSON");
  rejected("{\"a\":" + std::string(10000, '[') + std::string(10000, ']') + "}", "nested deeper than 64");
  const std::string empty = R"({"dtype":"U8","shape":[0],"data_offsets":[0,0]})";
  rejected("{\"a\":" + empty + ",\"a\":" + empty + "}", "a: key occurs twice");
  rejected("{\"a\":" + empty + ",\"\\u0061\":" + empty + "}", "a: key occurs twice");
  rejected(R"({"__metadata__":{},"__metadata__":{}})", "__metadata__: key occurs twice");
  rejected(R"({"a":{"dtype":"F32","dtype":"F32"}})", "dtype: key occurs twice");
  rejected(R"({"__metadata__":{"x":1}})", "__metadata__: must be an object of strings");
}

TEST(Safetensors, RejectsTooManyTensorsQuickly) {
  std::string header = "{";
  for (int i = 0; i < 65537; ++i)
    header += (i ? ",\"" : "\"") + std::to_string(i) + R"(":{"dtype":"U8","shape":[0],"data_offsets":[0,0]})";
  expect_rejected(safetensors(header + "}", ""), "at most 65536 tensors");
  std::string numbers = "0";
  for (int i = 0; i < 1 << 17; ++i) numbers += ",0";
  expect_rejected(safetensors("{\"a\":[" + numbers + "]}", ""), "more than 131072 values");
}

std::string repeated(const std::string& text, size_t times) {
  std::string out;
  for (size_t i = 0; i < times; ++i) out += text;
  return out;
}

// Everything below is as large as its limits allow.
TEST(Safetensors, TakesAtMost64MiBMoreThanTheFile) {
  const size_t mib = size_t{1} << 20;
  std::string tensors, metadata;
  for (int i = 0; i < 65536; ++i) {
    tensors += (i ? ",\"" : "\"") + std::string(180, 'x') + std::to_string(i) +
               R"(":{"dtype":"U8","shape":[0],"data_offsets":[0,0]})";
  }
  for (int i = 0; i < (1 << 17) - 1; ++i) {
    metadata += (i ? ",\"" : "\"") + std::string(50, 'x') + std::to_string(i) + "\":\"" + std::string(50, 'y') + "\"";
  }
  for (const std::string& header : std::vector<std::string>{
           "{" + tensors + "}",
           "{\"__metadata__\":{" + metadata + "}}",
           "{\"a\":[" + repeated("{},", (1 << 17) - 4) + "{}]}",
           "{\"a\":{\"dtype\":\"" + repeated("é", mib / 2 - 100) + "\"}}",
           "{\"" + repeated("x", mib - 10) + "\":1}",
           "{\"a\":\"" + repeated("x", 15 * mib),
           "{\"a\":" + repeated("1", 15 * mib) + "}",
           "{\"a\":" + repeated("\n", 15 * mib) + "}",
           "{\"a\":" + repeated("\n", mib - 10) + "}",
           "{\"a\":" + repeated("[", 15 * mib),
           "{" + repeated("\"\\\"\":0,", mib) + "}",
       }) {
    const TempFolder folder;
    write_file(folder / "m.safetensors", safetensors(header, ""));
    const int64_t before = testing::peak_memory_from_now();
    try {
      open_safetensors(folder / "m.safetensors");
    } catch (const LoadError& error) {
      EXPECT_LT(std::string(error.what()).size(), 1024u);
    }
    EXPECT_LT(peak_memory() - before, static_cast<int64_t>(header.size() + 64 * mib)) << header.substr(0, 60);
  }
}

TEST(Safetensors, RejectsBadEntries) {
  expect_entry_rejected("7", "must be an object, got 7");
  expect_entry_rejected(R"({"shape":[1],"data_offsets":[0,4]})", "dtype is missing");
  expect_entry_rejected(R"({"dtype":"F8_E5M2","shape":[4],"data_offsets":[0,4]})",
                        "dtype must be a supported type, got \"F8_E5M2\"");
  expect_entry_rejected(R"({"dtype":32,"shape":[1],"data_offsets":[0,4]})", "dtype must be a supported type, got 32");
  for (const char* shape :
       {"1", "[-1]", "[1.0]", "[1e0]", "[\"1\"]", "[null]", "[9223372036854775808]", "[-0]", "[18446744073709551616]",
        "[1,1,1,1,1,1,1,1,1]", "[4611686018427387904]", "[4294967296,4294967296]"}) {
    expect_entry_rejected(std::string(R"({"dtype":"F32","data_offsets":[0,4],"shape":)") + shape + "}", "shape must");
  }
  for (const char* offsets : {"4", "[0]", "[0,4,4]", "[-1,4]", "[0,4.0]", "[4,0]", "[0,5]", "[0,18446744073709551615]",
                              "[18446744073709551615,3]", "[0,3]"}) {
    expect_entry_rejected(std::string(R"({"dtype":"F32","shape":[1],"data_offsets":)") + offsets + "}",
                          "data_offsets must");
  }
}

TEST(Safetensors, RejectsHolesOverlapsAndTrailingBytes) {
  const auto two = [](int begin, int end, const std::string& data) {
    return safetensors(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[)" +
                           std::to_string(end - begin) + R"(],"data_offsets":[)" + std::to_string(begin) + "," +
                           std::to_string(end) + "]}}",
                       data);
  };
  expect_rejected(two(5, 8, "12345678"), "b: data must begin at byte");
  expect_rejected(two(3, 8, "12345678"), "b: data must begin at byte");
  expect_rejected(two(0, 4, "1234"), "data must begin at byte");
  expect_rejected(two(4, 7, "12345678"), "must end with its last tensor");
  const size_t whole = two(4, 8, "12345678").size();
  expect_rejected(two(4, 8, "1234567"),
                  "is cut short: must have " + std::to_string(whole) + " bytes, got " + std::to_string(whole - 1));
}

TEST(Safetensors, OpensRegularFilesOnly) {
  const TempFolder folder;
  const auto open = [&](const std::string& name) { return [path = folder / name] { open_safetensors(path); }; };
  ASSERT_EQ(::mkfifo((folder / "fifo").c_str(), 0600), 0);
  std::filesystem::create_symlink("loop", folder / "loop");
  expect_load_error(open("absent"), "cannot be opened");
  expect_load_error(open("loop"), "cannot be opened");
  expect_load_error(open("fifo"), "is not a regular file");
  expect_load_error(open("."), "is not a regular file");
  expect_load_error([] { open_safetensors("/dev/zero"); }, "is not a regular file");
}

TEST(Safetensors, ReportsAFileCutShortAfterOpening) {
  const TempFolder folder;
  write_file(folder / "m.safetensors", safetensors(kHeader, kData));
  const TensorFile file = open_safetensors(folder / "m.safetensors");
  std::filesystem::resize_file(folder / "m.safetensors", 8 + kHeader.size() + 2);
  char bytes[12];
  expect_load_error([&] { file.read(file.entries().at("a").begin, bytes, 12); }, "where data was expected");
}

TEST(Safetensors, ReadsTensorsPastFourAndEightGiB) {
  const TempFolder folder;
  constexpr uint64_t kGiB = uint64_t{1} << 30;
  const std::string header = R"({"big":{"dtype":"BF16","shape":[2,1073741824],"data_offsets":[0,4294967296]},)"
                             R"("at4":{"dtype":"U8","shape":[4294967296],"data_offsets":[4294967296,8589934592]},)"
                             R"("at8":{"dtype":"U8","shape":[1073741824],"data_offsets":[8589934592,9663676416]}})";
  const auto path = folder / "m.safetensors";
  write_file(path, safetensors(header, ""));
  const uint64_t data = 8 + header.size();
  std::filesystem::resize_file(path, data + 9 * kGiB);
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(static_cast<std::streamoff>(data + 4 * kGiB)).write("four", 4);
  file.seekp(static_cast<std::streamoff>(data + 8 * kGiB)).write("eight", 5);
  file.close();

  const TensorFile sparse = open_safetensors(path);
  char bytes[5];
  sparse.read(sparse.entries().at("at4").begin, bytes, 4);
  EXPECT_EQ(std::string(bytes, 4), "four");
  sparse.read(sparse.entries().at("at8").begin, bytes, 5);
  EXPECT_EQ(std::string(bytes, 5), "eight");
}

TEST(Safetensors, SurvivesEveryTruncationAndBitFlip) {
  const TempFolder folder;
  const auto path = folder / "m.safetensors";
  const std::string valid = safetensors(kHeader, kData);
  testing::expect_damage_survived(path, valid, kData.size(), [&] {
    const TensorFile file = open_safetensors(path);
    for (const auto& [name, entry] : file.entries()) {
      std::string data(entry.end - entry.begin, '\0');
      file.read(entry.begin, data.data(), data.size());
    }
  });
}

}  // namespace
}  // namespace mixtral
