// The versions of Mistral's tokenizers.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace mixtral {

// Which control tokens and chat format the tokenizer has (mistral-common's names).
//   v1: Mixtral 8x7B, Mistral 7B v0.1 and v0.2: "[INST]" is plain text
//   v2: Mistral 7B v0.3: control tokens for [INST] and tools
//   v3: Mixtral 8x22B: other tool messages; the same chat
//   v7: control tokens around the system prompt
enum class TokenizerVersion { kV1 = 1, kV2 = 2, kV3 = 3, kV7 = 7 };

std::string to_string(TokenizerVersion version);  // "v1"
// Takes "v1", "v2", "v3" and "v7"; throws std::invalid_argument.
TokenizerVersion parse_tokenizer_version(std::string_view name);
// "tokenizer.model.v3" -> v3. An image tokenizer ("....model.v7m1") has the text tokens of its version.
std::optional<TokenizerVersion> version_of_name(const std::string& name);

}  // namespace mixtral
