// The one exception of every loader: which file, which tensor or field, and why.
#pragma once

#include <stdexcept>
#include <string>

namespace mixtral {

// what() is one printable line, "<file>: <item>: <reason>", of at most some 5 KiB (printable.h).
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
