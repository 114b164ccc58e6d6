// What the fuzz targets share. A target is one file fuzz_<name>.cpp with a function fuzz(); scripts/fuzz.sh runs it.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>

#include "io/load_error.h"
#include "io/utf8.h"

// Reads the input as untrusted: returns or throws LoadError. Any other exception, a failed check, a report of a
// sanitizer, more than 5 s and much memory are findings.
void fuzz(std::string_view input);

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    fuzz({reinterpret_cast<const char*>(data), size});
  } catch (const mixtral::LoadError&) {
    return 0;
  }
  return 0;
}

namespace mixtral::fuzzing {

inline void check(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "check failed: %s\n", what);
  std::abort();
}

// A folder of this process, which goes there: its name is another each time, and the code under test must not see it.
// It stays when the process ends; scripts/fuzz.sh removes it.
inline std::filesystem::path folder() {
  static std::string name;
  if (!name.empty()) return ".";
  name = (std::filesystem::temp_directory_path() / "mixtral_fuzz_XXXXXX").string();
  check(mkdtemp(name.data()) != nullptr && chdir(name.c_str()) == 0, "a temporary folder can be made");
  return ".";
}

// Writes a file of that folder.
inline std::filesystem::path write(const std::string& name, std::string_view bytes) {
  std::ofstream file(folder() / name, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  file.close();
  check(file.good(), "the input can be written to a file");
  return folder() / name;
}

// Cuts off the input's part before the next line that reads "----", or all of it.
inline std::string_view take_part(std::string_view& input) {
  constexpr std::string_view kMark = "\n----\n";
  const size_t end = input.find(kMark);
  const std::string_view part = input.substr(0, end);
  input.remove_prefix(end == input.npos ? input.size() : end + kMark.size());
  return part;
}

}  // namespace mixtral::fuzzing
