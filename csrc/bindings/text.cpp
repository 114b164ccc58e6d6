#include "../io/size.h"
#include "../text/chat_format.h"
#include "../text/chat_template.h"
#include "../text/tokenizer.h"
#include "bindings.h"

namespace mixtral {
namespace {

std::vector<ChatMessage> chat_messages(const std::vector<py::dict>& dicts) {
  std::vector<ChatMessage> messages;
  for (const py::dict& dict : dicts) {
    ChatMessage& message = messages.emplace_back();
    for (const auto& [key, value] : dict) {
      const auto name = key.cast<std::string>();
      if (name == "role") {
        message.role = value.cast<std::string>();
      } else if (name == "content") {
        message.content = value.cast<std::string>();
      } else if (name == "prefix") {
        message.prefix = value.cast<bool>();
      } else if (name == "tool_calls") {
        message.tool_calls = value.cast<std::vector<std::string>>();
      } else if (name == "tool_call_id") {
        message.tool_call_id = value.cast<std::string>();
      } else {
        throw std::invalid_argument("apply_chat: messages[" + std::to_string(messages.size() - 1) +
                                    "] has an unknown key: " + name);
      }
    }
  }
  return messages;
}

std::optional<std::pair<std::string, std::string>> chat_template_in(const std::filesystem::path& folder) {
  std::optional<ChatTemplateText> found = find_chat_template(folder);
  if (!found) return std::nullopt;
  return std::make_pair(std::move(found->text), std::move(found->file));
}

void bind_chat(py::module_& m) {
  py::class_<ChatTemplate>(m, "ChatTemplate", "A Jinja template as the binary renders it. Raises LoadError.")
      .def(py::init([](std::string text, std::string file) {
             return ChatTemplate({std::move(text), std::move(file)});
           }),
           py::arg("text"), py::arg("file"))
      .def(
          "render",
          [](const ChatTemplate& self, const std::vector<py::dict>& messages,
             const std::map<std::string, std::string>& special_tokens, bool add_generation_prompt) {
            return self.render(chat_messages(messages), special_tokens, add_generation_prompt);
          },
          py::arg("messages"), py::arg("special_tokens"), py::arg("add_generation_prompt") = true,
          "Raises LoadError; ValueError with the template's words where it raises an exception.");
  py::class_<ChatFormat>(m, "ChatFormat", "How the binary makes ids of a conversation.")
      .def(py::init<const std::filesystem::path&, const Tokenizer&, const std::string&>(), py::arg("folder"),
           py::arg("tokenizer"), py::arg("wanted") = "",
           "wanted: a name or a file; empty: what the folder says. Raises LoadError, ValueError.")
      .def(
          "encode",
          [](const ChatFormat& self, const std::vector<py::dict>& messages, const std::string& tools) {
            return self.encode(chat_messages(messages), tools);
          },
          py::arg("messages"), py::arg("tools") = "",
          "messages: with role, content, prefix, tool_calls (JSON texts) and tool_call_id; tools: a JSON array. "
          "Raises\n"
          "ValueError, naming the message.")
      .def_property_readonly("name", &ChatFormat::name, "\"chatml\", ...; \"custom\".")
      .def_property_readonly("source", &ChatFormat::source)
      .def_property_readonly("end_of_answer", &ChatFormat::end_of_answer);
  m.def("find_chat_template", &chat_template_in, py::arg("folder"), "(text, file) or None. Raises LoadError.");
  m.def("special_token_texts", &special_token_texts, py::arg("folder"), "{\"bos_token\": \"<s>\", ...}");
  m.def("named_chat_templates", [] {
    const auto& templates = named_chat_templates();
    return std::map<std::string, std::string>(templates.begin(), templates.end());
  });
}

}  // namespace

void bind_text(py::module_& m) {
  py::class_<Tokenizer>(m, "Tokenizer", "SentencePiece BPE tokenizer of the Mistral family.")
      .def_static("in_folder", &Tokenizer::in_folder, py::arg("folder"), "Whether the folder has a tokenizer's file.")
      .def(py::init([](const std::filesystem::path& path, const std::optional<std::string>& version) {
             return version ? Tokenizer(path, parse_tokenizer_version(*version)) : Tokenizer(path);
           }),
           py::arg("path"), py::arg("version") = py::none(), ReleaseGil(),
           "path: a tokenizer.model or tokenizer.json file, or a folder that holds one. version: \"v1\", \"v2\", "
           "\"v3\" or \"v7\"; None:\n"
           "told by the file. Raises LoadError; ValueError for an unknown version.")
      .def("encode", &Tokenizer::encode, py::arg("text"), py::arg("add_bos") = false, py::arg("add_eos") = false,
           py::arg("parse_special") = false,
           "Text to ids. Control tokens in the text, such as \"[INST]\" or \"</s>\", stay text unless parse_special.")
      .def("special_in", &Tokenizer::special_in, py::arg("text"),
           "The ids of the control tokens that are written in the text, each once.")
      .def("decode", &Tokenizer::decode, py::arg("ids"),
           "Ids to text; control tokens give nothing. Ids without a piece too. Raises IndexError for a negative id.")
      .def(
          "piece", [](const Tokenizer& self, int64_t id) { return to_str(self.piece(id)); }, py::arg("id"),
          "The piece as stored; empty for an id without one. Raises IndexError for a negative id.")
      .def("is_control", &Tokenizer::is_control, py::arg("id"))
      .def("is_byte", &Tokenizer::is_byte, py::arg("id"))
      .def_property_readonly("vocab_size", &Tokenizer::vocab_size)
      .def_property_readonly("note", &Tokenizer::note, "What the folder's files disagree about; mostly empty.")
      .def_property_readonly("bos_id", &Tokenizer::bos_id)
      .def_property_readonly("eos_id", &Tokenizer::eos_id)
      .def_property_readonly("version", [](const Tokenizer& self) { return to_string(self.version()); });
  py::class_<StreamingDecoder>(m, "StreamingDecoder", "Ids in, text out, never half a code point.")
      .def(py::init<Tokenizer, bool>(), py::arg("tokenizer"), py::arg("continues_text") = false)
      .def("push", &StreamingDecoder::push, py::arg("id"), "Text completed by this token; may be empty.")
      .def("flush", &StreamingDecoder::flush, "What is left.");
  m.def("parse_size", &parse_size, py::arg("text"), "\"4GiB\" to bytes. Raises ValueError.");
  bind_chat(m);
}

}  // namespace mixtral
