#include "from_pretrained.h"

#include <c10/util/Exception.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../distributed/ranks.h"
#include "../io/load_error.h"
#include "../io/mapped_file.h"
#include "../io/size.h"
#include "../model/memory.h"
#include "../model/parameters.h"
#include "../model/transformer.h"
#include "config_reader.h"
#include "expert_offload.h"
#include "expert_read_ahead.h"
#include "folder.h"
#include "memory_plan.h"
#include "offload_plan.h"
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
  const WeightType type = parse_weight_type(options.dtype, config, options.device,
                                            options.pack && options.weights != Weights::kMmap, options.placement);
  return {folder, config, type, Checkpoint(folder, config, options)};
}

Mixtral read_all(const Prepared& prepared, torch::Device device, const LoadOptions& options) {
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

// That locking will bring into memory.
double missing_bytes(const MappedWeights& mapped) {
  double bytes = 0;
  for (const auto& [name, weight] : mapped.parameters)
    for (const PageRange& range : missing_pages(pages_around(weight.const_data_ptr(), weight.nbytes())))
      bytes += static_cast<double>(range.bytes);
  return bytes;
}

// What is not mapped is read, and told.
Mixtral map_all(const Prepared& prepared, torch::Device device, const LoadOptions& options) {
  const auto& [folder, config, type, checkpoint] = prepared;
  const MappedWeights mapped = checkpoint.map(config, type, options.placement);
  const double activations = plan_memory(config, type, options.device, 0, kChunkSize, options.placement).activations;
  const std::string which = options.mlock ? "" : " that are not mapped";
  check_memory("the weights of " + folder.string() + which + of_rank(options.placement),
               static_cast<double>(mapped.read_bytes) + activations + (options.mlock ? missing_bytes(mapped) : 0),
               options.device);
  if (options.warn && !mapped.why_read.empty()) {
    options.warn("weights mmap: " + bytes_text(static_cast<double>(mapped.read_bytes)) + " of " +
                 bytes_text(static_cast<double>(mapped.bytes + mapped.read_bytes)) +
                 " are read, not mapped, among them " + mapped.why_read);
  }
  Mixtral model(config, scalar_type(type.dtype), device, type.packing, options.placement, options.world,
                mapped.parameters);
  torch::OrderedDict<std::string, torch::Tensor> read;
  for (const auto& item : model->named_parameters())
    if (!mapped.parameters.count(item.key())) read.insert(item.key(), item.value());
  checkpoint.read_into(read, type.packing, nullptr);
  if (config.is_moe() && options.read_ahead) model->set_expert_runner(std::make_shared<ExpertReadAhead>(mapped));
  return model;
}

// All experts on the CPU, and copies of some on the device.
Mixtral offload(const Prepared& prepared, torch::Device device, const LoadOptions& options) {
  const auto& [folder, config, type, checkpoint] = prepared;
  const OffloadPlan plan = plan_offload(config, type, options.device, options.gpu_memory, options.routing_counts);
  const double simulated = options.simulate_gpu ? plan.on_device_bytes() + plan.staging() : 0;
  check_memory("the experts of " + folder.string(), weight_bytes(config, type) + simulated, "cpu");
  ParameterMap experts;
  std::vector<ExpertWeights> layers(static_cast<size_t>(config.num_layers));
  for (const Parameter& parameter : model_parameters(config)) {
    if (!parameter.is_expert) continue;
    const auto weight = empty_parameter(parameter, scalar_type(type.dtype), torch::kCPU, type.packing);
    experts.emplace(parameter.name, weight);
    ExpertWeights& layer = layers.at(static_cast<size_t>(parameter.layer));
    (parameter.cut == Cut::kGateUp ? layer.gate_up : layer.down) = weight;
  }
  Mixtral model(config, scalar_type(type.dtype), device, type.packing, Placement(), nullptr, experts);
  checkpoint.read_into(model->named_parameters(), type.packing, options.progress);
  model->set_expert_runner(
      std::make_shared<ExpertOffload>(make_arena(device), layers, plan.on_device, /*cpu_rows=*/-1, model->dtype()));
  release_free_memory();
  return model;
}

[[noreturn]] void fail_to_lock(const Prepared& prepared, double bytes, const std::string& reason) {
  rlimit limit;
  const bool limited = ::getrlimit(RLIMIT_MEMLOCK, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY;
  throw OutOfMemory("mlock: " + bytes_text(bytes) + " of weights of " + prepared.folder.string() +
                    " cannot be locked in memory: " + reason + "; RLIMIT_MEMLOCK (`ulimit -l`) of this process is " +
                    (limited ? bytes_text(static_cast<double>(limit.rlim_cur)) : "unlimited"));
}

// What the system allows is asked before minutes of reading.
void check_lock(const Prepared& prepared, const Placement& placement) {
  const double bytes = plan_memory(prepared.config, prepared.type, "cpu", 0, kChunkSize, placement).weights;
  if (!may_lock(static_cast<uint64_t>(bytes))) fail_to_lock(prepared, bytes, std::strerror(errno));
}

void lock_weights(const Prepared& prepared, const Mixtral& model) {
  for (const auto& item : model->named_parameters()) {
    const torch::Tensor& weight = item.value();
    if (weight.is_cpu() && !lock_pages(pages_around(weight.const_data_ptr(), weight.nbytes())))
      fail_to_lock(prepared, static_cast<double>(weight.nbytes()), item.key() + ": " + std::strerror(errno));
  }
}

Mixtral load(const Prepared& prepared, torch::Device device, const LoadOptions& options) {
  if (options.mlock && device.is_cpu()) check_lock(prepared, options.placement);
  Mixtral model = options.weights == Weights::kMmap ? map_all(prepared, device, options)
                  : options.gpu_memory > 0          ? offload(prepared, device, options)
                                                    : read_all(prepared, device, options);
  if (options.mlock) lock_weights(prepared, model);
  return model;
}

// A host, or a container of one: the memory of such a place is shared by the ranks there.
std::string host_name() {
  char name[256] = {};
  gethostname(name, sizeof name - 1);
  std::string boot;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
  return boot + " " + name;
}

// Before any of them allocates. Mapped weights are the system's to keep or drop, and each GPU is of one rank: they do
// not count.
void check_ranks_fit(Communicator& world, const Prepared& prepared, const LoadOptions& options) {
  const auto& [folder, config, type, checkpoint] = prepared;
  const bool counts = options.device == "cpu" && options.weights != Weights::kMmap;
  const double own = counts ? plan_memory(config, type, options.device, 0, kChunkSize, options.placement).to_load() : 0;
  std::vector<RankMemory> ranks;
  for (const std::string& text : world.exchange_texts(std::to_string(own) + " " + host_name()))
    ranks.push_back({text.substr(text.find(' ')), std::stod(text)});
  load_together(world, [&, &folder = folder] {
    check_fits_host("the weights of " + folder.string(), ranks, static_cast<size_t>(world.rank()),
                    static_cast<double>(host_memory()));
  });
}

// All ranks get their part, or none does.
Mixtral load_on_ranks(const std::filesystem::path& model_folder, torch::Device device, const LoadOptions& options) {
  Communicator& world = *options.world;
  std::optional<Prepared> prepared;
  load_together(world, [&] {
    check_options(options);
    prepared.emplace(prepare(model_folder, options));
  });
  check_same(world, rank_description(prepared->config, prepared->checkpoint, prepared->type, options.placement));
  check_ranks_fit(world, *prepared, options);
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

void check_options(const LoadOptions& options) {
  if (options.weights == Weights::kMmap && options.device != "cpu")
    throw std::invalid_argument("weights mmap needs device cpu, got " + options.device);
  if (options.weights == Weights::kMmap && options.check_weights)
    throw std::invalid_argument("check_weights reads all weights: it needs weights read or direct, got mmap");
  if (options.weights == Weights::kMmap && options.gpu_memory > 0)
    throw std::invalid_argument("gpu_memory needs weights read or direct, got mmap");
  if (options.mlock && options.device != "cpu" && options.gpu_memory == 0)
    throw std::invalid_argument("mlock needs weights in the memory of the CPU: device cpu or gpu_memory, got device " +
                                options.device);
  if (options.simulate_gpu && options.gpu_memory == 0)
    throw std::invalid_argument("simulate_gpu needs gpu_memory: how much the GPU is to have");
  if (options.gpu_memory > 0 && (options.device == "cpu") != options.simulate_gpu)
    throw std::invalid_argument(options.simulate_gpu ? "simulate_gpu needs device cpu, got " + options.device
                                                     : "gpu_memory needs device cuda, got cpu");
  if (options.gpu_memory > 0 && !options.placement.is_whole())
    throw std::invalid_argument("gpu_memory needs the whole model in one process, got " + options.placement.name());
}

Weights parse_weights(const std::string& name) {
  if (name == "read") return Weights::kRead;
  if (name == "direct") return Weights::kDirect;
  if (name == "mmap") return Weights::kMmap;
  throw std::invalid_argument("weights must be read, direct or mmap, got " + name);
}

Mixtral from_pretrained(const std::filesystem::path& folder, const LoadOptions& options) {
  if (options.world) return load_on_ranks(folder, options.world->device(), options);
  check_options(options);
  const torch::Device device = find_device(options.device);
  return load(prepare(folder, options), device, options);
}

}  // namespace mixtral
