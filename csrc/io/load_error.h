// The one exception of every loader: which file, which tensor or field, and why.
#pragma once

#include <stdexcept>
#include <string>

namespace mixtral {

// what() is one line: "<file>: <item>: <reason>"; text taken from the file is escaped and cut to 256 bytes.
class LoadError : public std::runtime_error {
 public:
  // `item` is a tensor or field name; empty when the file as a whole is meant.
  LoadError(std::string file, std::string item, std::string reason);

  const std::string& file() const { return file_; }
  const std::string& item() const { return item_; }
  const std::string& reason() const { return reason_; }

 private:
  std::string file_, item_, reason_;
};

}  // namespace mixtral
