#include "output_folder.h"

#include <cerrno>
#include <stdexcept>
#include <system_error>

#include "../io/json.h"
#include "../text/gguf_tokenizer.h"
#include "../text/sentencepiece_writer.h"

namespace mixtral {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kMaxCarriedBytes = 16 << 20;  // a larger file is no description

// Absolute, without a slash at the end.
fs::path folder_path(const fs::path& folder) {
  const fs::path path = fs::absolute(folder).lexically_normal();
  return path.has_filename() ? path : path.parent_path();
}

// Not weights, nor what describes them; not what a version control system or a downloader has left.
bool is_carried(const fs::directory_entry& entry) {
  std::error_code ignored;
  if (!entry.is_regular_file(ignored)) return false;  // follows links: the files of a Hugging Face cache are some
  const std::string name = entry.path().filename().string(), extension = entry.path().extension().string();
  if (name.rfind("tokenizer", 0) == 0) return true;
  for (const char* weights : {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ot", ".onnx"})
    if (extension == weights) return false;
  for (const char* written :
       {"config.json", "params.json", "quantize_config.json", "adapter_config.json", "upcycle.json"})
    if (name == written) return false;
  return name.front() != '.' && name.find(".index.json") == std::string::npos && extension != ".incomplete" &&
         entry.file_size(ignored) <= kMaxCarriedBytes;
}

void write_tokenizer_of(const fs::path& gguf, const fs::path& folder) {
  const Vocabulary vocabulary = read_gguf_tokenizer(gguf);
  write_text(folder / "tokenizer.model", sentencepiece_bytes(vocabulary, gguf.string()));
  const nlohmann::json config = {{"tokenizer_class", "LlamaTokenizer"},
                                 {"legacy", vocabulary.prefix == SpacePrefix::kEvery},
                                 {"unk_token", "<unk>"},
                                 {"bos_token", "<s>"},
                                 {"eos_token", "</s>"}};
  write_text(folder / "tokenizer_config.json", config.dump(2) + "\n");
  const auto chat_template = read_gguf_chat_template(gguf);
  if (chat_template) write_text(folder / "chat_template.jinja", *chat_template);
}

}  // namespace

OutputFile::OutputFile(const fs::path& path) : path_(path), file_(std::fopen(path.c_str(), "wb"), std::fclose) {
  if (!file_) fail();
}

void OutputFile::write(const void* data, size_t bytes) {
  if (bytes > 0 && std::fwrite(data, 1, bytes, file_.get()) != bytes) fail();
}

void OutputFile::close() {
  if (std::fclose(file_.release()) != 0) fail();
}

void OutputFile::fail() const {
  throw std::runtime_error(path_.string() + ": cannot be written: " + std::generic_category().message(errno));
}

void write_text(const fs::path& path, const std::string& text) {
  OutputFile file(path);
  file.write(text.data(), text.size());
  file.close();
}

void replace_file(const fs::path& path, const std::function<void(OutputFile&)>& write) {
  const fs::path incomplete = path.string() + ".incomplete";
  std::error_code error;
  try {
    OutputFile file(incomplete);
    write(file);
    file.close();
    fs::rename(incomplete, path, error);
    if (error) throw std::runtime_error(path.string() + ": cannot be written: " + error.message());
  } catch (...) {
    fs::remove(incomplete, error);
    throw;
  }
}

NewFolder::NewFolder(const fs::path& final_path)
    : final_path_(folder_path(final_path)), path_(final_path_.string() + ".incomplete") {
  remove();
  if (!fs::create_directories(path_)) throw std::runtime_error(path_.string() + ": cannot be replaced");
}

void NewFolder::finish() {
  std::error_code ignored;
  fs::remove(final_path_, ignored);  // an empty folder
  fs::rename(path_, final_path_);
}

// One level, file by file: libtorch exports a remove_all of its own that does not work.
void NewFolder::remove() const {
  std::error_code ignored;
  if (!fs::is_directory(path_, ignored)) return;
  for (const auto& entry : fs::directory_iterator(path_, ignored)) fs::remove(entry.path(), ignored);
  fs::remove(path_, ignored);
}

void check_unused(const fs::path& folder) {
  std::error_code ignored;
  if (!fs::exists(folder, ignored)) return;
  if (!fs::is_directory(folder, ignored) || !fs::is_empty(folder, ignored)) {
    throw std::invalid_argument(folder.string() + ": must not exist or be an empty folder");
  }
}

void carry_files(const fs::path& source, const fs::path& folder) {
  std::error_code ignored;
  if (fs::is_directory(source, ignored)) {
    for (const auto& entry : fs::directory_iterator(source))
      if (is_carried(entry)) fs::copy_file(entry.path(), folder / entry.path().filename());
  }
  const fs::path gguf = find_gguf_tokenizer(source);
  if (!gguf.empty()) write_tokenizer_of(gguf, folder);
}

}  // namespace mixtral
