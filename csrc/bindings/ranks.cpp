#include "../distributed/ranks.h"

#include <torch/csrc/utils/pybind.h>

#include "../distributed/communicator.h"
#include "bindings.h"

namespace mixtral {

void bind_ranks(py::module_& m) {
  py::class_<RankOptions>(m, "RankOptions")
      .def(py::init(&from_kwargs<RankOptions>))
      .def_readwrite("tensor_size", &RankOptions::tensor_size)
      .def_readwrite("stages", &RankOptions::stages)
      .def_readwrite("expert_parallel", &RankOptions::expert_parallel)
      .def_readwrite("backend", &RankOptions::backend)
      .def_readwrite("device", &RankOptions::device)
      .def_readwrite("timeout", &RankOptions::timeout)
      .def_readwrite("command", &RankOptions::command, "What starts another rank.");
  py::class_<Communicator, std::shared_ptr<Communicator>>(m, "Communicator", "For measurements.")
      .def_property_readonly("rank", &Communicator::rank)
      .def_property_readonly("size", &Communicator::size)
      .def_property_readonly("bytes_sent", &Communicator::bytes_sent)
      .def("all_reduce_ordered", &Communicator::all_reduce_ordered, py::arg("tensor"), ReleaseGil())
      .def("barrier", &Communicator::barrier, ReleaseGil());
  m.def("join_ranks", &join_ranks, py::arg("options"), ReleaseGil(), "None for a single rank.");
}

}  // namespace mixtral
