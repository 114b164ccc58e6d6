#include "file_kind.h"

#include <algorithm>
#include <cctype>
#include <string>

#include "load_error.h"

namespace mixtral {
namespace {

bool starts_with(const std::string& text, const std::string& start) {
  return text.compare(0, start.size(), start) == 0;
}

// Without white space in front, in small letters.
std::string normalised(std::string text) {
  text.erase(0, std::min(text.find_first_not_of(" \t\r\n"), text.size()));
  std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return std::tolower(c); });
  return text;
}

// Empty: nothing that is known.
std::string kind_of(const std::string& head) {
  if (head.empty()) return "is empty: download it again";
  const std::string text = normalised(head);
  if (starts_with(text, "version https://git-lfs"))
    return "is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder";
  for (const char* page : {"<!doctype html", "<html", "<head", "<?xml"}) {
    if (starts_with(text, page))
      return "is a web page, not the file itself: the download was refused; log in with `hf auth login`, accept the "
             "model's terms on its page and download again";
  }
  if (starts_with(head, "GGUF")) return "is a GGUF file under another name";
  if (starts_with(head, "PK\x03\x04")) return "is a zip archive, such as PyTorch writes, under another name";
  // Protocol 2 and later. A safetensors file may begin with the same two bytes, but has zeros behind them.
  if (head.size() > 4 && head[0] == '\x80' && head[1] >= 2 && head[1] <= 5 && (head[2] != 0 || head[3] != 0))
    return "is a Python pickle under another name";
  return "";
}

}  // namespace

void check_kind(const File& file) {
  constexpr uint64_t kBytes = 64;
  std::string head(std::min(file.size(), kBytes), '\0');
  file.read(0, head.data(), head.size());
  const std::string kind = kind_of(head);
  if (!kind.empty()) throw LoadError(file.path(), "", kind);
}

}  // namespace mixtral
