#include "from_pretrained.h"

#include <c10/util/Exception.h>

#include <stdexcept>
#include <string>

#include "../model/memory.h"
#include "../model/transformer.h"
#include "config_reader.h"
#include "folder.h"
#include "memory_plan.h"
#include "weights.h"

namespace mixtral {
namespace {

torch::Device find_device(const std::string& name) {
  const torch::Device device(name);
  if (!device.is_cpu() && !device.is_cuda()) throw std::invalid_argument("device must be cpu or cuda, got " + name);
  if (device.is_cuda() && !at::hasCUDA()) {
    throw std::runtime_error("device " + name + ": this build or this machine has no CUDA device; use cpu");
  }
  return device;
}

std::string of_rank(const Placement& placement) {
  return placement.is_whole() ? "" : " for rank " + std::to_string(placement.rank()) + " (" + placement.name() + ")";
}

}  // namespace

Mixtral from_pretrained(const std::filesystem::path& model_folder, const LoadOptions& options) {
  const std::filesystem::path folder = find_model(model_folder);
  const torch::Device device = find_device(options.device);
  Config config = read_config(folder, options.warn);
  if (options.experts_per_token > 0) {
    config.check_experts_per_token(options.experts_per_token);
    config.top_k = options.experts_per_token;
  }
  options.placement.check(config);
  const WeightType type = parse_weight_type(options.dtype, config, options.device, options.pack, options.placement);
  const Checkpoint checkpoint(folder, config, options);
  // Torch ends the process when memory runs out inside an op, so the check counts the temporary memory of packing too.
  const std::string what = "the weights of " + folder.string() + of_rank(options.placement);
  check_fits(what, config, type, options.device, available_memory, options.placement);
  const auto allocate = [&] {
    try {
      return Mixtral(config, scalar_type(type.dtype), device, type.packing);
    } catch (const c10::Error& error) {  // allocating is all that torch does here
      throw OutOfMemory(what + ": " + error.what_without_backtrace());
    }
  };
  Mixtral model = allocate();
  checkpoint.read_into(model->named_parameters(), type.packing, options.progress);
  release_free_memory();  // of staging and packing
  return model;
}

}  // namespace mixtral
