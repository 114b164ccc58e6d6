#include <map>
#include <vector>

#include "checkpoint_files.h"
#include "io/torch_pickle.h"
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

// ---- zip archives by hand

// `wide`: sizes and offsets in zip64 fields, and a zip64 end record.
std::string zip(const std::vector<std::pair<std::string, std::string>>& members, bool wide = false) {
  std::string file, directory;
  const auto number = [&](uint64_t value) {
    return bytes_of<uint32_t>(wide ? 0xffffffff : static_cast<uint32_t>(value));
  };
  for (const auto& [name, data] : members) {
    const uint64_t header = file.size(), size = data.size();
    const std::string sizes = bytes_of<uint32_t>(0) + number(size) + number(size);  // checksum, sizes
    const std::string name_size = bytes_of(static_cast<uint16_t>(name.size()));
    file += "PK\x03\x04" + std::string(10, '\0') + sizes + name_size + bytes_of<uint16_t>(4) + name + "FB" +
            std::string(2, '\0') + data;
    const std::string extra =
        wide ? bytes_of<uint16_t>(1) + bytes_of<uint16_t>(24) + bytes_of(size) + bytes_of(size) + bytes_of(header) : "";
    directory += "PK\x01\x02" + std::string(12, '\0') + sizes + name_size +
                 bytes_of(static_cast<uint16_t>(extra.size())) + std::string(10, '\0') + number(header) + name + extra;
  }
  const uint64_t begin = file.size(), end64 = begin + directory.size(), count = members.size();
  file += directory;
  if (wide) {
    file += "PK\x06\x06" + bytes_of<uint64_t>(44) + std::string(12, '\0') + bytes_of(count) + bytes_of(count) +
            bytes_of<uint64_t>(directory.size()) + bytes_of(begin);
    file += "PK\x06\x07" + std::string(4, '\0') + bytes_of(end64) + bytes_of<uint32_t>(1);
  }
  return file + "PK\x05\x06" + std::string(4, '\0') + bytes_of(static_cast<uint16_t>(count)) +
         bytes_of(static_cast<uint16_t>(count)) + number(directory.size()) + number(begin) + bytes_of<uint16_t>(0);
}

// ---- pickles by hand

std::string text(const std::string& value) { return "X" + bytes_of(static_cast<uint32_t>(value.size())) + value; }

// torch._utils._rebuild_tensor_v2 of f32 [2,3] at element 1 of storage "0", which has 8 elements.
std::string tensor(const std::string& offset = "K\x01", const std::string& shape = "K\x02K\x03\x86",
                   const std::string& strides = "K\x03K\x01\x86") {
  return "ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage") + "ctorch\nFloatStorage\n" + text("0") +
         text("cpu") + "K\x08tQ" + offset + shape + strides + "\x89" + "ccollections\nOrderedDict\n)RtR";
}

std::string dict(const std::string& items) { return "\x80\x02}q" + std::string(1, '\0') + "(" + items + "u."; }

const std::string kStorage = "0123abcdefghijklmnopqrstuvwx4567";  // 8 floats

std::string archive(const std::string& pickle, bool wide = false) {
  return zip({{"a/data.pkl", pickle}, {"a/byteorder", "little"}, {"a/data/0", kStorage}}, wide);
}

void expect_rejected(const std::string& bytes, const std::string& part) {
  const TempFolder folder;
  write_file(folder / "m.bin", bytes);
  expect_load_error([&] { open_torch_pickle(folder / "m.bin"); }, part);
}

void expect_pickle_rejected(const std::string& pickle, const std::string& part) {
  expect_rejected(archive(pickle), part);
}

std::string read(const TensorFile& file, const std::string& name) {
  const TensorEntry& entry = file.entries().at(name);
  std::string data(entry.end - entry.begin, '\0');
  file.read(entry.begin, data.data(), data.size());
  return data;
}

TEST(TorchPickle, ReadsEntriesAndBytes) {
  const TempFolder folder;
  for (const bool wide : {false, true}) {
    write_file(folder / "m.bin", archive(dict(text("t") + tensor() + text("n") + "K\x07"), wide));
    const TensorFile file = open_torch_pickle(folder / "m.bin");
    ASSERT_EQ(file.entries().size(), 1u);
    EXPECT_EQ(file.entries().at("t").dtype, "F32");
    EXPECT_EQ(file.entries().at("t").shape, (std::vector<int64_t>{2, 3}));
    EXPECT_EQ(read(file, "t"), kStorage.substr(4, 24));
  }
}

TEST(TorchPickle, ReadsScalarsAndEmptyTensors) {
  const TempFolder folder;
  // The strides of an empty tensor and of a dimension of size 1 mean nothing.
  write_file(folder / "m.bin", archive(dict(text("s") + tensor("K\x02", ")", ")") + text("e") +
                                            tensor("K\x08", "K\0K\x05\x86"s, "K\x09K\x09\x86") + text("o") +
                                            tensor("K\0"s, "K\x01K\x02\x86", "K\x63K\x01\x86"))));
  const TensorFile file = open_torch_pickle(folder / "m.bin");
  EXPECT_EQ(read(file, "s"), kStorage.substr(8, 4));
  EXPECT_EQ(read(file, "e"), "");
  EXPECT_EQ(read(file, "o"), kStorage.substr(0, 8));
}

TEST(TorchPickle, RejectsTensorsThatLeaveTheirStorage) {
  const auto rejected = [](const std::string& call, const std::string& part) {
    expect_pickle_rejected(dict(text("t") + call), "t: " + part);
  };
  const std::string huge = "\x8a\x08" + bytes_of(INT64_MAX), minus = "J" + bytes_of<int32_t>(-1);
  rejected(tensor("K\x03"), "must lie within its storage");
  rejected(tensor(minus), "must lie within its storage");
  rejected(tensor(huge), "must lie within its storage");
  rejected(tensor("K\x01", huge + "K\x03\x86"), "shape must fit 64-bit sizes");
  rejected(tensor("K\x01", minus + "K\x03\x86"), "shape must hold sizes");
  rejected(tensor("K\x01", text("2") + "K\x03\x86"), "shape must hold sizes");
  rejected(tensor("K\x01", "(K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01t"), "shape must have at most 8 sizes");
  rejected(tensor("K\x01", "K\x02K\x03\x86", "K\x01K\x02\x86"), "must be contiguous");
  rejected(tensor("K\x01", "K\x02K\x03\x86", minus + "K\x01\x86"), "must be contiguous");
  rejected(tensor("K\x01", "K\x02K\x03\x86", "K\x01\x85"), "must be contiguous");
  rejected(replaced(tensor(), "K\x08t", "K\x09t"), "storage must have the size that the pickle says");
  rejected(replaced(tensor(), text("0"), text("1")), "storage is missing in the archive");
  rejected(replaced(tensor(), text("0"), "K\x01"), "must have a storage");
  rejected(replaced(tensor(), "tQ", "t"), "must have a storage");
}

TEST(TorchPickle, RejectsWhatIsNoStateDict) {
  expect_pickle_rejected(dict(""), "holds no tensor");
  expect_pickle_rejected("\x80\x02K\x01.", "must hold a dict of tensors");
  expect_pickle_rejected(dict("K\x01" + tensor()), "must have names of text");
  expect_pickle_rejected(dict(text("\xff") + tensor()), "must have names of text");
  expect_pickle_rejected(dict(text("t") + tensor() + text("t") + tensor()), "t: occurs twice");
  expect_pickle_rejected(dict(text("t") + "cos\nsystem\n"), "pickle: asks Python for os.system, which");
  expect_pickle_rejected(dict(text("t") + "c\xff\nsystem\n"), "pickle: asks Python for something, which");
}

TEST(TorchPickle, RejectsBadPickles) {
  const std::string start = "\x80\x02";
  const auto rejected = [](const std::string& pickle, const std::string& part) {
    expect_pickle_rejected(pickle, "pickle: " + part);
  };
  rejected("", "ends early");
  rejected("\x80\x05}.", "must have protocol 2");
  rejected("}.", "must have protocol 2");
  rejected(start + "}", "ends early");
  rejected(start + ".", "takes more values than there are");
  rejected(start + "}s.", "takes more values than there are");
  rejected(start + "}(K\x01u.", "adds to something that is no dict");
  rejected(start + "K\x01(K\x01K\x02u.", "adds to something that is no dict");
  rejected(start + "}(s.", "takes more values than there are");  // below the mark
  rejected(start + "}u.", "takes more values than there are");
  rejected(start + "}h\x01.", "uses a value that it did not keep");
  rejected(start + "q\x01.", "takes more values than there are");
  rejected(start + "}r" + bytes_of(0xffffffff) + ".", "must have at most 262144 values");
  rejected(start + std::string(300000, 'N') + ".", "must have at most 262144 values");
  rejected(start + std::string(2000, '(') + ".", "is nested too deeply");
  rejected(start + "K\x01)R.", "has a call of no function");
  rejected(start + "ccollections\nOrderedDict\n]R.", "has a call of no function");
  rejected(start + "K\x01}b.", "sets the attributes of something that is no dict");
  rejected(start + "ccollections\nOrderedDict", "ends early");
  rejected(start + "X" + bytes_of(0xffffffff), "ends early");
  rejected(start + "\x8a\x09" + std::string(9, '\x01') + ".", "has a number that needs more than 64 bits");
  rejected(start + "i.", "has an opcode that a state dict does not need, at byte 2");
}

TEST(TorchPickle, NeedsLittleMemoryForPicklesOfAnyKind) {
  const auto repeated = [](const std::string& text) {
    std::string all = "\x80\x02]q\x01";
    while (all.size() < (4 << 20) - 64) all += text;
    return all;
  };
  for (const char* ops : {"h\x01", "h\x01\x61", "(h\x01h\x01t0", "(", "N", "}", "\x85", "q\x01"}) {
    const int64_t before = testing::peak_memory_from_now();
    expect_pickle_rejected(repeated(ops), "pickle: ");
    EXPECT_LT(peak_memory() - before, 68 << 20) << ops;  // the file and 64 MiB
  }
}

TEST(TorchPickle, SurvivesValuesInThemselves) {
  // d = {}; d["model"] = d; and tuples nested 100000 deep
  expect_pickle_rejected("\x80\x02}q\x01" + text("model") + "h\x01s.", "holds no tensor");
  expect_pickle_rejected("\x80\x02}" + text("t") + ")" + std::string(100000, '\x85') + "s.", "holds no tensor");
}

TEST(TorchPickle, RejectsBadArchives) {
  const std::string valid = archive(dict(text("t") + tensor()));
  expect_rejected("", "is empty: download it again");
  expect_rejected("abcd", "does not begin as a zip archive");
  expect_rejected("version https://git-lfs.github.com/spec/v1", "is a git-lfs pointer");
  expect_rejected("\x80\x02\x8a\x0a", "before torch 1.6");
  expect_rejected("PK\x03\x04", "is not a whole zip archive");
  expect_rejected(valid.substr(0, valid.size() - 1), "is not a whole zip archive");
  expect_rejected(zip({{"a/x", ""}}), "data.pkl is missing");
  expect_rejected(zip({{"a/data.pkl", "."}, {"a/byteorder", "big"}}), "a/byteorder: must be little");
  expect_rejected(zip({{"a/data.pkl", "."}, {"a/data.pkl", "."}}), "a/data.pkl: is twice in the zip directory");
  const size_t record = valid.find("PK\x01\x02");
  const auto patched = [&](size_t at, const std::string& bytes) {
    return std::string(valid).replace(record + at, bytes.size(), bytes);
  };
  expect_rejected(patched(10, "\x08"), "a/data.pkl: must be stored without compression");
  expect_rejected(patched(8, "\x01"), "a/data.pkl: must be stored without compression");
  expect_rejected(patched(42, bytes_of(0xfffffffe)), "zip directory: is damaged");
  expect_rejected(patched(42, bytes_of(1)), "is not where the zip directory says");
  expect_rejected(patched(20, bytes_of(0x7fffffff) + bytes_of(0x7fffffff)), "a/data.pkl: must end within the file");
  expect_rejected(patched(0, "XX"), "zip directory: is damaged");
}

TEST(TorchPickle, SurvivesEveryTruncationAndBitFlip) {
  const TempFolder folder;
  const auto path = folder / "m.bin";
  for (const bool wide : {false, true}) {
    const std::string valid = archive(dict(text("t") + tensor() + text("u") + tensor("K\0"s)), wide);
    testing::expect_damage_survived(path, valid, kStorage.size(), [&] {
      const TensorFile file = open_torch_pickle(path);
      for (const auto& named : file.entries()) read(file, named.first);
    });
  }
}

}  // namespace
}  // namespace mixtral
