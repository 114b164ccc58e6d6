#include "tokenizer_version.h"

#include <array>
#include <stdexcept>

namespace mixtral {
namespace {

constexpr std::array<TokenizerVersion, 4> kVersions = {TokenizerVersion::kV1, TokenizerVersion::kV2,
                                                       TokenizerVersion::kV3, TokenizerVersion::kV7};

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

}  // namespace

std::string to_string(TokenizerVersion version) { return "v" + std::to_string(static_cast<int>(version)); }

TokenizerVersion parse_tokenizer_version(std::string_view name) {
  for (const TokenizerVersion version : kVersions) {
    if (name == to_string(version)) return version;
  }
  throw std::invalid_argument("tokenizer: version must be v1, v2, v3 or v7, got " + std::string(name));
}

std::optional<TokenizerVersion> version_of_name(const std::string& name) {
  for (const TokenizerVersion version : kVersions) {
    const std::string suffix = ".model." + to_string(version);
    if (ends_with(name, suffix) || ends_with(name, suffix + "m1")) return version;
  }
  return std::nullopt;
}

}  // namespace mixtral
