#include "load_error.h"

#include "printable.h"

namespace mixtral {
namespace {

constexpr size_t kMaxPathBytes = 4096;
constexpr size_t kMaxItemBytes = 256;
constexpr size_t kMaxReasonBytes = 1024;

std::string one_line(const std::string& file, const std::string& item, const std::string& reason) {
  return printable(file, kMaxPathBytes) + ": " + (item.empty() ? "" : printable(item, kMaxItemBytes) + ": ") +
         printable(reason, kMaxReasonBytes);
}

}  // namespace

LoadError::LoadError(std::string file, std::string item, std::string reason)
    : std::runtime_error(one_line(file, item, reason)),
      file_(std::move(file)),
      item_(std::move(item)),
      reason_(std::move(reason)) {}

}  // namespace mixtral
