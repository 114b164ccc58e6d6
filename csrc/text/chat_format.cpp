#include "chat_format.h"

#include <algorithm>
#include <map>
#include <optional>
#include <stdexcept>

#include "../io/file.h"
#include "../io/load_error.h"
#include "chat_template.h"

namespace mixtral {
namespace {

namespace fs = std::filesystem;

constexpr TokenizerVersion kVersions[] = {TokenizerVersion::kV1, TokenizerVersion::kV2, TokenizerVersion::kV3,
                                          TokenizerVersion::kV7};

std::string name_of(TokenizerVersion version) { return "mistral-" + to_string(version); }

std::optional<TokenizerVersion> version_named(const std::string& name) {
  for (const TokenizerVersion version : kVersions) {
    if (name == name_of(version)) return version;
  }
  return std::nullopt;
}

const std::string* template_named(const std::string& name) {
  for (const auto& [known, text] : named_chat_templates()) {
    if (name == known) return &text;
  }
  return nullptr;
}

bool has_controls(const Tokenizer& tokenizer, TokenizerVersion version) {
  const auto has = [&](const char* piece) { return tokenizer.control_id(piece).has_value(); };
  if (version == TokenizerVersion::kV7 && !(has("[SYSTEM_PROMPT]") && has("[/SYSTEM_PROMPT]"))) return false;
  return version == TokenizerVersion::kV1 || (has("[INST]") && has("[/INST]"));
}

std::string all_names() {
  std::string names;
  for (const TokenizerVersion version : kVersions) names += name_of(version) + ", ";
  for (const auto& [name, text] : named_chat_templates()) names += name + ", ";
  return names.substr(0, names.size() - 2);
}

// The templates' variables; both ends of a sequence have a text even where no file names it.
std::map<std::string, std::string> variables(const fs::path& folder, const Tokenizer& tokenizer) {
  std::map<std::string, std::string> texts = special_token_texts(folder);
  texts.emplace("bos_token", tokenizer.piece(tokenizer.bos_id()));
  texts.emplace("eos_token", tokenizer.piece(tokenizer.eos_id()));
  return texts;
}

}  // namespace

const std::vector<std::pair<std::string, std::string>>& named_chat_templates() {
  static const std::vector<std::pair<std::string, std::string>> templates = {
      {"chatml",
       "{% for message in messages %}"
       "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
       "{% endfor %}"
       "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"},
      {"zephyr",
       "{% for message in messages %}"
       "{{ '<|' + message.role + '|>\\n' + message.content + eos_token + '\\n' }}"
       "{% endfor %}"
       "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"},
      {"llama-2",
       "{% set system = messages[0].content if messages[0].role == 'system' else none %}"
       "{% for message in (messages if system is none else messages[1:]) %}"
       "{% if message.role != ('user' if loop.index is odd else 'assistant') %}"
       "{{ raise_exception('user and assistant must speak in turn, after at most one system message') }}"
       "{% endif %}"
       "{% set shown = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if loop.first and system is not none else '' %}"
       "{% if message.role == 'user' %}"
       "{{ bos_token + '[INST] ' + (shown + message.content).strip() + ' [/INST]' }}"
       "{% else %}"
       "{{ ' ' + message.content.strip() + ' ' + eos_token }}"
       "{% endif %}"
       "{% endfor %}"},
      {"alpaca",
       "{% set given = messages[0].role == 'system' %}"
       "{{ bos_token + (messages[0].content if given else 'Below is an instruction that describes a task. Write a "
       "response that appropriately completes the request.') + '\\n\\n' }}"
       "{% for message in (messages[1:] if given else messages) %}"
       "{% if message.role == 'user' %}"
       "{{ '### Instruction:\\n' + message.content + '\\n\\n' }}"
       "{% elif message.role == 'assistant' %}"
       "{{ '### Response:\\n' + message.content + eos_token + '\\n\\n' }}"
       "{% else %}"
       "{{ raise_exception('after the system message come user and assistant in turn') }}"
       "{% endif %}"
       "{% endfor %}"
       "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"},
      {"vicuna",
       "{% set given = messages[0].role == 'system' %}"
       "{{ bos_token + (messages[0].content if given else 'A chat between a curious user and an artificial "
       "intelligence "
       "assistant. The assistant gives helpful, detailed, and polite answers to the user\\'s questions.') + ' ' }}"
       "{% for message in (messages[1:] if given else messages) %}"
       "{% if message.role == 'user' %}"
       "{{ 'USER: ' + message.content + ' ' }}"
       "{% elif message.role == 'assistant' %}"
       "{{ 'ASSISTANT: ' + message.content + eos_token }}"
       "{% else %}"
       "{{ raise_exception('after the system message come user and assistant in turn') }}"
       "{% endif %}"
       "{% endfor %}"
       "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"},
  };
  return templates;
}

struct ChatFormat::Impl {
  Tokenizer tokenizer;
  std::string name, source;
  std::optional<ChatTemplate> jinja;                  // none: Mistral's format of `version`
  std::map<std::string, std::string> special_tokens;  // for the template
  TokenizerVersion version = TokenizerVersion::kV1;

  std::vector<int64_t> encode(const std::vector<ChatMessage>& messages, const std::string& tools = "") const {
    if (!jinja) return apply_chat(tokenizer, version, messages, tools);
    if (!tools.empty()) throw std::invalid_argument("chat: tools need a format of Mistral's, not a chat template");
    check_end(messages);
    return tokenizer.encode(jinja->render(messages, special_tokens), /*add_bos=*/false, /*add_eos=*/false,
                            /*parse_special=*/true);
  }

  // The ids, or none for what the format refuses.
  std::optional<std::vector<int64_t>> try_encode(const std::vector<ChatMessage>& messages) const {
    try {
      return encode(messages);
    } catch (const std::invalid_argument&) {
      return std::nullopt;
    } catch (const LoadError&) {
      return std::nullopt;
    }
  }

  // The first word that the template puts behind an answer; empty if none, or if it shows no answer.
  std::string word_after_answer() const {
    const std::string answer = "An answer.";
    std::string text;
    try {
      text = jinja->render({{"user", "Hi"}, {"assistant", answer}}, special_tokens, /*add_generation_prompt=*/false);
    } catch (const std::invalid_argument&) {
      return "";
    } catch (const LoadError&) {
      return "";
    }
    const size_t place = text.rfind(answer);
    if (place == std::string::npos) return "";
    const size_t begin = std::min(text.find_first_not_of(" \n", place + answer.size()), text.size());
    return text.substr(begin, text.find_first_of(" \n", begin) - begin);
  }

  // Whether the other format gives the same ids; a system message that this one refuses does not matter.
  bool agrees(const Impl& other) const {
    const std::vector<ChatMessage> short_chat = {{"user", " Hello there\n"}};
    const std::vector<ChatMessage> long_chat = {{"user", "Hi "}, {"assistant", "So?"}, {"user", "\nWhat is 2 + 2?"}};
    std::vector<ChatMessage> with_system = long_chat;
    with_system.insert(with_system.begin(), {"system", "Be brief."});
    if (try_encode(short_chat) != other.try_encode(short_chat)) return false;
    if (try_encode(long_chat) != other.try_encode(long_chat)) return false;
    const auto ids = try_encode(with_system);
    return !ids || ids == other.try_encode(with_system);
  }

  // The known format with the same ids: a template is recognised by what it renders, not by how it is written.
  // Throws LoadError where it renders nothing.
  std::string recognized() const {
    try {
      encode({{"user", "Hi"}});
    } catch (const std::invalid_argument&) {  // its own words, for whoever chats
      return "custom";
    }
    Impl other = *this;
    for (const auto& [known, text] : named_chat_templates()) {
      other.jinja = ChatTemplate({text, known});
      if (agrees(other)) return known;
    }
    other.jinja.reset();
    for (const TokenizerVersion known : kVersions) {
      other.version = known;
      if (has_controls(tokenizer, known) && agrees(other)) return name_of(known);
    }
    return "custom";
  }
};

ChatFormat::ChatFormat(const fs::path& folder, const Tokenizer& tokenizer, const std::string& wanted) {
  Impl impl{tokenizer, wanted, "--chat-template", {}, variables(folder, tokenizer)};
  std::error_code error;
  if (!wanted.empty()) {
    const std::optional<TokenizerVersion> version = version_named(wanted);
    const std::string* text = template_named(wanted);
    if (version) {
      if (!has_controls(tokenizer, *version)) {
        throw std::invalid_argument("chat template " + wanted + ": the tokenizer has none of its control tokens");
      }
      impl.version = *version;
    } else if (text) {
      impl.jinja = ChatTemplate({*text, wanted});
    } else if (fs::exists(wanted, error)) {
      impl.jinja = ChatTemplate({read_text(wanted, kMaxTemplateBytes), wanted});
      impl.name = impl.recognized();
    } else {
      throw std::invalid_argument("chat template must be a file or one of " + all_names() + ", got " + wanted);
    }
  } else if (const std::optional<ChatTemplateText> found = find_chat_template(folder)) {
    impl.source = fs::path(found->file).filename().string();
    impl.jinja = ChatTemplate(*found);
    impl.name = impl.recognized();
  } else if (tokenizer.version() == TokenizerVersion::kV1 && fs::exists(folder / "config.json", error)) {
    throw std::invalid_argument(folder.string() + ": has no chat template: it is a base model, which continues text " +
                                "(`generate`); to chat all the same, choose a format: --chat-template " +
                                name_of(TokenizerVersion::kV1) + ", chatml or another");
  } else {
    impl.version = tokenizer.version();
    impl.name = name_of(impl.version);
    impl.source = "tokenizer " + to_string(impl.version);
  }
  impl_ = std::make_shared<const Impl>(std::move(impl));
}

std::vector<int64_t> ChatFormat::encode(const std::vector<ChatMessage>& messages, const std::string& tools) const {
  return impl_->encode(messages, tools);
}
const std::string& ChatFormat::name() const { return impl_->name; }
const std::string& ChatFormat::source() const { return impl_->source; }

bool ChatFormat::reads_control_tokens() const { return impl_->jinja.has_value(); }

std::string ChatFormat::end_of_answer() const {
  const Tokenizer& tokenizer = impl_->tokenizer;
  if (!impl_->jinja) return tokenizer.piece(tokenizer.eos_id());
  const std::string word = impl_->word_after_answer();
  const std::vector<int64_t> ids = tokenizer.encode(word, false, false, /*parse_special=*/true);
  if (!ids.empty() && tokenizer.is_control(ids[0])) return tokenizer.piece(ids[0]);
  // A marker that is text; words, such as those of the next prompt, are none.
  const bool marker =
      word.size() > 2 && (word[0] == '<' || word[0] == '[') && (word.back() == '>' || word.back() == ']');
  return marker ? word : "";
}

}  // namespace mixtral
