#include "zip_file.h"

#include <algorithm>
#include <optional>
#include <string_view>
#include <utility>

#include "byte_reader.h"
#include "load_error.h"

// An archive ends with its directory: one record for each member, an end record that says where they begin, and before
// that, in zip64, an end record with 64-bit numbers and a locator that says where that one is.

namespace mixtral {
namespace {

constexpr uint32_t kEnd = 0x06054b50, kEnd64 = 0x06064b50, kLocator64 = 0x07064b50;
constexpr uint32_t kDirectoryRecord = 0x02014b50, kLocalHeader = 0x04034b50;
constexpr uint64_t kEndBytes = 22, kLocatorBytes = 20, kEnd64Bytes = 56, kLocalHeaderBytes = 30;
constexpr uint64_t kMaxCommentBytes = 65535;
constexpr uint64_t kMaxDirectoryBytes = 4 << 20;
constexpr uint32_t kIn64 = 0xffffffff;  // the number stands in the zip64 field
const std::string kItem = "zip directory";

// Reads `bytes` bytes at `offset`, which must lie in the file.
std::string read_at(const File& file, uint64_t offset, uint64_t bytes) {
  if (offset > file.size() || bytes > file.size() - offset) throw LoadError(file.path(), kItem, "is damaged");
  std::string buffer(bytes, '\0');
  file.read(offset, buffer.data(), bytes);
  return buffer;
}

struct Directory {
  uint64_t members = 0, bytes = 0, offset = 0;
};

std::optional<Directory> read_end64(const File& file, uint64_t end) {
  if (end < kLocatorBytes) return std::nullopt;
  const std::string locator = read_at(file, end - kLocatorBytes, kLocatorBytes);
  ByteReader reader(locator, file.path(), kItem);
  if (reader.number<uint32_t>() != kLocator64) return std::nullopt;
  reader.take(4);  // disk
  const std::string record = read_at(file, reader.number<uint64_t>(), kEnd64Bytes);
  ByteReader end64(record, file.path(), kItem);
  if (end64.number<uint32_t>() != kEnd64) end64.fail("is damaged");
  end64.take(28);  // sizes, versions, disks, members on this disk
  Directory directory;
  directory.members = end64.number<uint64_t>();
  directory.bytes = end64.number<uint64_t>();
  directory.offset = end64.number<uint64_t>();
  return directory;
}

Directory find_directory(const File& file) {
  const uint64_t tail_bytes = std::min(file.size(), kEndBytes + kMaxCommentBytes);
  const std::string tail = read_at(file, file.size() - tail_bytes, tail_bytes);
  const size_t at = tail.rfind("PK\x05\x06");
  if (at == std::string::npos || tail.size() - at < kEndBytes) {
    throw LoadError(file.path(), "", "is not a whole zip archive: its directory is missing at the end");
  }
  if (const auto directory = read_end64(file, file.size() - tail.size() + at)) return *directory;
  ByteReader reader(std::string_view(tail).substr(at), file.path(), kItem);
  reader.take(10);  // signature, disks, members on this disk
  Directory directory;
  directory.members = reader.number<uint16_t>();
  directory.bytes = reader.number<uint32_t>();
  directory.offset = reader.number<uint32_t>();
  return directory;
}

struct Record {
  std::string name;
  uint64_t bytes = 0, header = 0;  // `header`: offset of the member's local header
};

// The zip64 field among a record's extra fields has the numbers that did not fit, in this order.
void read_extra(std::string_view extra, const File& file, uint64_t& bytes, uint64_t& stored, uint64_t& header) {
  ByteReader fields(extra, file.path(), kItem);
  while (!fields.at_end()) {
    const auto id = fields.number<uint16_t>();
    ByteReader field(fields.take(fields.number<uint16_t>()), file.path(), kItem);
    if (id != 1) continue;
    for (uint64_t* number : {&bytes, &stored, &header}) {
      if (*number == kIn64) *number = field.number<uint64_t>();
    }
  }
}

Record read_record(ByteReader& reader, const File& file) {
  if (reader.number<uint32_t>() != kDirectoryRecord) reader.fail("is damaged");
  reader.take(4);  // versions
  const auto flags = reader.number<uint16_t>(), method = reader.number<uint16_t>();
  reader.take(8);  // time, checksum
  uint64_t stored = reader.number<uint32_t>(), bytes = reader.number<uint32_t>();
  const auto name_bytes = reader.number<uint16_t>(), extra_bytes = reader.number<uint16_t>(),
             comment_bytes = reader.number<uint16_t>();
  reader.take(8);  // disk, attributes
  uint64_t header = reader.number<uint32_t>();
  Record record;
  record.name = reader.take(name_bytes);
  read_extra(reader.take(extra_bytes), file, bytes, stored, header);
  reader.take(comment_bytes);
  if ((flags & 1) != 0 || method != 0 || stored != bytes) {
    throw LoadError(file.path(), record.name, "must be stored without compression or encryption");
  }
  record.bytes = bytes;
  record.header = header;
  return record;
}

// A member's contents lie behind its local header, whose extra fields may differ from the directory's.
ZipMember locate(const File& file, const Record& record) {
  const std::string header = read_at(file, record.header, kLocalHeaderBytes);
  ByteReader reader(header, file.path(), record.name);
  if (reader.number<uint32_t>() != kLocalHeader) reader.fail("is not where the zip directory says");
  reader.take(22);
  const uint64_t name_bytes = reader.number<uint16_t>(), extra_bytes = reader.number<uint16_t>();
  ZipMember member;
  member.begin = record.header + kLocalHeaderBytes + name_bytes + extra_bytes;
  if (member.begin > file.size() || record.bytes > file.size() - member.begin) {
    reader.fail("must end within the file of " + std::to_string(file.size()) + " bytes");
  }
  member.end = member.begin + record.bytes;
  return member;
}

}  // namespace

std::map<std::string, ZipMember> read_zip_directory(const File& file) {
  const Directory directory = find_directory(file);
  if (directory.bytes > kMaxDirectoryBytes) throw LoadError(file.path(), kItem, "must have at most 4 MiB");
  const std::string bytes = read_at(file, directory.offset, directory.bytes);
  ByteReader reader(bytes, file.path(), kItem);
  std::map<std::string, ZipMember> members;
  while (!reader.at_end()) {
    const Record record = read_record(reader, file);
    if (!members.emplace(record.name, locate(file, record)).second) {
      throw LoadError(file.path(), record.name, "is twice in the zip directory");
    }
  }
  if (members.size() != directory.members) reader.fail("does not have the members that it counts");
  return members;
}

}  // namespace mixtral
