// The conversions of tensors, devices and dtypes; torch/extension.h would take five times as long to compile.
#include <torch/csrc/utils/pybind.h>

#include "../checkpoint/folder.h"
#include "../checkpoint/from_pretrained.h"
#include "../distributed/ranks.h"
#include "../model/follower.h"
#include "../model/transformer.h"
#include "bindings.h"

namespace mixtral {
namespace {

std::shared_ptr<MixtralImpl> load(const std::filesystem::path& folder, torch::Device device, const std::string& dtype,
                                  bool pack, const std::filesystem::path& lora, bool check_weights,
                                  int64_t experts_per_token, const std::string& weights, bool mlock, bool read_ahead,
                                  int64_t gpu_memory, const std::filesystem::path& routing_counts,
                                  const py::object& progress, const RankOptions& ranks) {
  LoadOptions options;
  options.device = device.str();
  options.dtype = dtype;
  options.pack = pack;
  options.lora = lora;
  options.check_weights = check_weights;
  options.experts_per_token = experts_per_token;
  options.weights = parse_weights(weights);
  options.mlock = mlock;
  options.read_ahead = read_ahead;
  options.gpu_memory = gpu_memory;
  options.routing_counts = routing_counts;
  options.warn = [](const std::string& message) {
    const py::gil_scoped_acquire gil;
    warn(message, 2);  // who called Mixtral.from_pretrained of model.py
  };
  options.progress = [&progress](uint64_t done, uint64_t total) {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) {
      throw py::error_already_set();
    }
    if (!progress.is_none()) {
      progress(done, total);
    }
  };
  const py::gil_scoped_release no_gil;
  options.world = join_ranks(ranks);
  if (options.world)
    options.placement =
        Placement::of_rank(options.world->rank(), ranks.tensor_size, ranks.stages, ranks.expert_parallel);
  return mixtral::from_pretrained(folder, options).ptr();
}

std::shared_ptr<MixtralImpl> from_config(const Config& config, torch::Device device, const std::string& dtype,
                                         uint64_t seed) {
  const WeightType type = parse_weight_type(dtype, config, device.str(), /*pack=*/false);
  auto model = std::make_shared<MixtralImpl>(config, scalar_type(type.dtype), device, type.packing);
  model->init_random(seed);
  return model;
}

py::dict named_parameters(const MixtralImpl& model) {
  py::dict parameters;
  for (const auto& item : model.named_parameters()) {
    parameters[py::str(item.key())] = item.value();
  }
  return parameters;
}

py::object expert_counts(const MixtralImpl& model) {
  if (!model.expert_runner()) return py::none();
  const ExpertCounts counts = [&] {
    const py::gil_scoped_release no_gil;
    return model.expert_runner()->counts();
  }();
  py::dict result;
  result["hits"] = counts.hits;
  result["misses"] = counts.misses;
  result["bytes"] = counts.bytes;
  return result;
}

}  // namespace

void bind_model(py::module_& m) {
  m.def("find_model", &find_model, py::arg("model"),
        "The folder that a path or a name in the Hugging Face cache means.");
  py::class_<MixtralImpl, std::shared_ptr<MixtralImpl>>(m, "Mixtral")
      .def_static("from_pretrained", &load, py::arg("folder"), py::arg("device"), py::arg("dtype"), py::arg("pack"),
                  py::arg("lora") = "", py::arg("check_weights") = false, py::arg("experts_per_token") = 0,
                  py::arg("weights") = "read", py::arg("mlock") = false, py::arg("read_ahead") = true,
                  py::arg("gpu_memory") = 0, py::arg("routing_counts") = "", py::arg("progress") = py::none(),
                  py::arg("ranks") = RankOptions())
      .def_static("from_config", &from_config, py::arg("config"), py::arg("device"), py::arg("dtype"), py::arg("seed"),
                  ReleaseGil())
      .def("forward", &MixtralImpl::forward, py::arg("input_ids"), ReleaseGil())
      .def("follow", &follow, ReleaseGil())
      .def("stop", &MixtralImpl::stop, ReleaseGil())
      .def("named_parameters", &named_parameters)
      .def("expert_counts", &expert_counts)
      .def_property_readonly("config", [](const MixtralImpl& self) { return Config(self.config()); })
      .def_property_readonly("bytes_sent",
                             [](const MixtralImpl& self) { return self.world() ? self.world()->bytes_sent() : 0; })
      .def_property_readonly("rank", [](const MixtralImpl& self) { return self.placement().rank(); })
      .def_property_readonly("device", &MixtralImpl::device)
      .def_property_readonly("dtype", &MixtralImpl::dtype)
      .def_property_readonly("weight_type", [](const MixtralImpl& self) { return self.weight_type().name(); });
}

}  // namespace mixtral
