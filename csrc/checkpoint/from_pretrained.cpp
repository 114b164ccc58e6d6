#include "from_pretrained.h"

#include <c10/util/Exception.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "../distributed/ranks.h"
#include "../io/load_error.h"
#include "../model/memory.h"
#include "../model/transformer.h"
#include "config_reader.h"
#include "folder.h"
#include "memory_plan.h"
#include "rank_description.h"
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

// A checkpoint whose files are open and fit, and what is to be made of it.
struct Prepared {
  std::filesystem::path folder;
  Config config;
  WeightType type;
  Checkpoint checkpoint;
};

void check_placement(const std::filesystem::path& folder, const Config& config, const Placement& placement) {
  try {
    placement.check(config);
  } catch (const std::invalid_argument& error) {
    throw LoadError(folder.string(), "", error.what());
  }
}

// Reads no weights.
Prepared prepare(const std::filesystem::path& model_folder, const LoadOptions& options) {
  const std::filesystem::path folder = find_model(model_folder);
  Config config = read_config(folder, options.warn);
  if (options.experts_per_token > 0) {
    config.check_experts_per_token(options.experts_per_token);
    config.top_k = options.experts_per_token;
  }
  check_placement(folder, config, options.placement);
  const WeightType type = parse_weight_type(options.dtype, config, options.device, options.pack, options.placement);
  return {folder, config, type, Checkpoint(folder, config, options)};
}

Mixtral load(const Prepared& prepared, torch::Device device, const LoadOptions& options) {
  const auto& [folder, config, type, checkpoint] = prepared;
  // Torch ends the process when memory runs out inside an op, so the check counts the temporary memory of packing too.
  const std::string what = "the weights of " + folder.string() + of_rank(options.placement);
  check_fits(what, config, type, options.device, available_memory, options.placement);
  Mixtral model = nullptr;
  try {
    model = Mixtral(config, scalar_type(type.dtype), device, type.packing, options.placement, options.world);
  } catch (const c10::Error& error) {  // allocating is all that torch does here
    throw OutOfMemory(what + ": " + error.what_without_backtrace());
  }
  checkpoint.read_into(model->named_parameters(), type.packing, options.progress);
  release_free_memory();  // of staging and packing
  return model;
}

// All ranks get their part, or none does.
Mixtral load_on_ranks(const std::filesystem::path& model_folder, torch::Device device, const LoadOptions& options) {
  Communicator& world = *options.world;
  std::optional<Prepared> prepared;
  load_together(world, [&] { prepared.emplace(prepare(model_folder, options)); });
  check_same(world, rank_description(prepared->config, prepared->checkpoint, prepared->type, options.placement));
  LoadOptions reading = options;
  reading.progress = [&](uint64_t done, uint64_t total) {
    world.keep_alive();
    if (options.progress) options.progress(done, total);
  };
  Mixtral model = nullptr;
  load_together(world, [&] { model = load(*prepared, device, reading); });
  return model;
}

}  // namespace

Mixtral from_pretrained(const std::filesystem::path& folder, const LoadOptions& options) {
  const torch::Device device = options.world ? options.world->device() : find_device(options.device);
  if (options.world) return load_on_ranks(folder, device, options);
  return load(prepare(folder, options), device, options);
}

}  // namespace mixtral
