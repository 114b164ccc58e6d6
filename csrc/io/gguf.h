// Reader of GGUF files, versions 2 and 3 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): metadata, names
// and shapes of tensors, data. The header is validated whole before anything is allocated for the data. No torch in
// here.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "tensor_file.h"

namespace mixtral {

struct GgufValue {
  enum Kind { kInteger, kNumber, kBool, kText, kArray } kind = kInteger;
  int64_t integer = 0;  // kInteger; kBool: 0 or 1
  double number = 0;
  std::string text;
  // kArray: it stays in the file until it is asked for.
  uint32_t element_type = 0;
  uint64_t count = 0;
  uint64_t begin = 0, end = 0;  // byte range in the file
};

struct GgufFile {
  TensorFile tensors;  // shapes in the order of torch: the last dimension is contiguous; dtypes as in ggml_type.h
  std::map<std::string, GgufValue> metadata;

  const GgufValue* find(const std::string& key) const;

  // All below throw LoadError, naming the key, when it is missing or has another type.
  int64_t integer(const std::string& key) const;
  int64_t integer(const std::string& key, int64_t absent) const;
  double number(const std::string& key) const;
  std::string text(const std::string& key) const;
  std::vector<std::string> texts(const std::string& key) const;
  std::vector<float> numbers(const std::string& key) const;     // of f32
  std::vector<int32_t> integers(const std::string& key) const;  // of i32

 private:
  const GgufValue& at(const std::string& key, GgufValue::Kind kind, const char* expected) const;
  std::string array_bytes(const std::string& key, uint32_t element_type, const char* expected) const;
};

// Throws LoadError when the file is no regular file or breaks a rule of the format.
GgufFile open_gguf(const std::filesystem::path& path);

// `path` itself when it is called .gguf or is a GGUF file under another name, or the only .gguf file of the folder
// `path`; empty when there is none. Throws LoadError when the folder has several.
std::filesystem::path find_gguf(const std::filesystem::path& path);

}  // namespace mixtral
