#include "../text/chat.h"
#include "../text/tokenizer.h"
#include "bindings.h"

namespace mixtral {
namespace {

std::vector<int64_t> chat_ids(const Tokenizer& tokenizer, const std::vector<py::dict>& dicts) {
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
      } else {
        throw std::invalid_argument("apply_chat: messages[" + std::to_string(messages.size() - 1) +
                                    "] expected the keys role, content and prefix, got " + name);
      }
    }
  }
  return apply_chat(tokenizer, messages);
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
      .def("apply_chat", &chat_ids, py::arg("messages"),
           "[{\"role\": \"user\", \"content\": \"Hi\"}, ...] to prompt ids, equal to mistral-common's. \"prefix\": "
           "True on the\n"
           "last message, an assistant's: the model goes on with it. Raises ValueError, naming the message.")
      .def("is_control", &Tokenizer::is_control, py::arg("id"))
      .def("is_byte", &Tokenizer::is_byte, py::arg("id"))
      .def_property_readonly("vocab_size", &Tokenizer::vocab_size)
      .def_property_readonly("note", &Tokenizer::note, "What the folder's files disagree about; mostly empty.")
      .def_property_readonly("bos_id", &Tokenizer::bos_id)
      .def_property_readonly("eos_id", &Tokenizer::eos_id)
      .def_property_readonly("version", [](const Tokenizer& self) { return to_string(self.version()); });
  py::class_<StreamingDecoder>(m, "StreamingDecoder", "Ids in, text out, never half a code point.")
      .def(py::init<Tokenizer>(), py::arg("tokenizer"))
      .def("push", &StreamingDecoder::push, py::arg("id"), "Text completed by this token; may be empty.")
      .def("flush", &StreamingDecoder::flush, "What is left.");
}

}  // namespace mixtral
