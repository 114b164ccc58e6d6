// Writing a file or a folder that appears complete or not at all. No torch in here.
#pragma once

#include <cstdio>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>

namespace mixtral {

// A file being written; any failure is a std::runtime_error that names it.
class OutputFile {
 public:
  explicit OutputFile(const std::filesystem::path& path);
  void write(const void* data, size_t bytes);
  void close();

 private:
  [[noreturn]] void fail() const;
  const std::filesystem::path path_;
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> file_;
};

void write_text(const std::filesystem::path& path, const std::string& text);

// Replaces a file with what `write` writes, or leaves it as it was: the new one has the name "<path>.incomplete" until
// it is whole. Throws what `write` throws, and std::runtime_error.
void replace_file(const std::filesystem::path& path, const std::function<void(OutputFile&)>& write);

// "<final path>.incomplete", removed with all that is in it unless it was moved to its final name.
class NewFolder {
 public:
  explicit NewFolder(const std::filesystem::path& final_path);
  ~NewFolder() { remove(); }
  const std::filesystem::path& path() const { return path_; }
  void finish();

 private:
  void remove() const;
  std::filesystem::path final_path_, path_;
};

// Throws std::invalid_argument unless `folder` does not exist or is an empty folder.
void check_unused(const std::filesystem::path& folder);

// What belongs to the model `source`, but for its weights and their description: tokenizer, chat template,
// generation_config.json, licence, README. Of a GGUF file without a tokenizer beside it: its own, as files.
void carry_files(const std::filesystem::path& source, const std::filesystem::path& folder);

}  // namespace mixtral
