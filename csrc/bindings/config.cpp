#include "../model/config.h"

#include "../checkpoint/config_reader.h"
#include "../checkpoint/folder.h"
#include "../checkpoint/generation_config.h"
#include "../checkpoint/output_folder.h"
#include "../checkpoint/save.h"
#include "bindings.h"

namespace mixtral {

namespace {

// What generation_config.json says of sampling, as arguments of `generate`.
py::dict sampling_defaults(const std::filesystem::path& folder) {
  const GenerationConfig config = read_generation_config(folder);
  py::dict values;
  const auto put = [&values](const char* key, const auto& value) {
    if (value) values[key] = *value;
  };
  put("temperature", config.effective_temperature());
  put("top_p", config.top_p);
  put("top_k", config.top_k);
  put("min_p", config.min_p);
  put("repetition_penalty", config.repetition_penalty);
  return values;
}

// For copies and pickles.
py::tuple pickled(const Config& config) { return py::make_tuple(config_json(config), config.window_source); }

Config unpickled(const py::tuple& state) {
  Config config = parse_config(state[0].cast<std::string>(), CheckpointLayout::kHuggingFace, "Config");
  config.window_source = state[1].cast<std::string>();
  return config;
}

}  // namespace

void bind_config(py::module_& m) {
  m.def("carry_files", &carry_files, py::arg("source"), py::arg("folder"),
        "Copies what belongs to the model `source` but for weights and their description: tokenizer, licence, card.");
  m.def("sampling_defaults", &sampling_defaults, py::arg("folder"),
        "The sampling of generation_config.json as arguments of generate. Raises LoadError.");
  py::class_<Config>(m, "Config", "The architecture of a checkpoint. Sizes are counts; `window` is keys a query sees.")
      .def(py::init([](const py::kwargs& fields) {
             const Config config = from_kwargs<Config>(fields);
             config.validate("Config");
             return config;
           }),
           "Config(hidden_size=..., num_layers=..., ...). Raises LoadError for a missing or unfit field.")
      .def_static(
          "from_folder",
          [](const std::filesystem::path& folder) {
            return read_config(find_model(folder), [](const std::string& message) { warn(message); });
          },
          py::arg("folder"),
          "Reads config.json or params.json. Raises LoadError naming the field; warns where weight files disagree.")
      .def_readwrite("hidden_size", &Config::hidden_size)
      .def_readwrite("intermediate_size", &Config::intermediate_size)
      .def_readwrite("num_layers", &Config::num_layers)
      .def_readwrite("num_heads", &Config::num_heads)
      .def_readwrite("num_kv_heads", &Config::num_kv_heads)
      .def_readwrite("head_dim", &Config::head_dim)
      .def_readwrite("vocab_size", &Config::vocab_size)
      .def_readwrite("max_position", &Config::max_position)
      .def_readwrite("num_experts", &Config::num_experts)
      .def_readwrite("top_k", &Config::top_k)
      .def_readwrite("renormalize", &Config::renormalize)
      .def_readwrite("select_bias", &Config::select_bias)
      .def_readwrite("router_in_f32", &Config::router_in_f32)
      .def_readwrite("rms_norm_eps", &Config::rms_norm_eps)
      .def_readwrite("rope_theta", &Config::rope_theta)
      .def_readwrite("window", &Config::window)
      .def_readwrite("window_source", &Config::window_source)
      .def_readwrite("tie_word_embeddings", &Config::tie_word_embeddings)
      .def_readwrite("dtype", &Config::dtype)
      .def_readwrite("quantization", &Config::quantization)
      .def_readwrite("bos_token_id", &Config::bos_token_id)
      .def_readwrite("eos_token_ids", &Config::eos_token_ids)
      .def_property_readonly("is_moe", &Config::is_moe)
      .def_property_readonly("total_parameters", &Config::total_parameters)
      .def_property_readonly("active_parameters", &Config::active_parameters, "Per token.")
      .def("config_json", &config_json, "The text of a config.json.")
      .def("params_json", &params_json, "The text of a params.json, of a consolidated folder.")
      .def(
          "to_dict", [](const Config& self) { return py::module_::import("json").attr("loads")(config_json(self)); },
          "config.json as a dict, as configurations of transformers have it.")
      .def(py::pickle(&pickled, &unpickled))
      .def("kv_bytes_per_token", &Config::kv_bytes_per_token, py::arg("element_size"));
}

}  // namespace mixtral
