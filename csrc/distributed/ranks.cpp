#include "ranks.h"

#include <ATen/Parallel.h>
#include <fcntl.h>
#include <torch/cuda.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "../io/load_error.h"
#include "c10d.h"
#include "child_ranks.h"
#include "communicator.h"
#include "shm.h"
#include "sockets.h"

namespace mixtral {
namespace {

// Those of torchrun, and what the leader tells its children besides.
constexpr const char* kLeader = "MIXTRAL_LEADER";        // its process
constexpr const char* kDescriptor = "MIXTRAL_RANKS_FD";  // of the segment
constexpr const char* kAddress = "MASTER_ADDR";          // of the store
constexpr const char* kPort = "MASTER_PORT";             //
constexpr const char* kOfChildren[] = {kLeader, kDescriptor,  kAddress,     kPort,
                                       "RANK",  "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"};
constexpr const char* kLoopback = "127.0.0.1";

struct World {
  int rank = 0, size = 1;
  int local_rank = 0, local_size = 1;
  bool one_host() const { return local_size == size; }
};

std::string text_of(const char* variable) {
  const char* value = std::getenv(variable);
  if (value == nullptr || *value == '\0') throw LoadError(variable, "", "is not set, though RANK is");
  return value;
}

int number_of(const char* variable) {
  const std::string text = text_of(variable);
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0)
    throw LoadError(variable, "", "must be a number, got " + text);
  return value;
}

// Whether torchrun, or a leader, has given this process its place.
bool has_place() { return std::getenv("RANK") != nullptr && std::getenv("WORLD_SIZE") != nullptr; }

// From the environment.
World world_of(const RankOptions& options) {
  const int size = options.tensor_size * options.stages;
  if (!has_place()) return {0, size, 0, size};
  World world{number_of("RANK"), number_of("WORLD_SIZE")};
  if (world.size != size) {
    throw LoadError("WORLD_SIZE", "",
                    "is " + std::to_string(world.size) + ", but the model is cut into " + std::to_string(size) +
                        " parts: " + std::to_string(options.tensor_size) + " by tensors, " +
                        std::to_string(options.stages) + " by layers");
  }
  if (world.rank >= size) throw LoadError("RANK", "", std::to_string(world.rank) + " of " + std::to_string(size));
  world.local_rank = std::getenv("LOCAL_RANK") ? number_of("LOCAL_RANK") : world.rank;
  world.local_size = std::getenv("LOCAL_WORLD_SIZE") ? number_of("LOCAL_WORLD_SIZE") : size;
  return world;
}

void check_options(const RankOptions& options) {
  const std::string& backend = options.backend;
  if (options.tensor_size < 1 || options.stages < 1)
    throw std::invalid_argument("the parts of a model must be at least 1, got " + std::to_string(options.tensor_size) +
                                " by tensors, " + std::to_string(options.stages) + " by layers");
  if (!(options.timeout > 0)) throw std::invalid_argument("the timeout of ranks must be more than 0 seconds");
  if (backend != "auto" && backend != "shm" && backend != "gloo" && backend != "nccl")
    throw std::invalid_argument("the parallel backend must be auto, shm, gloo or nccl, got " + backend);
  const bool on_cpu = options.device == "cpu";
  if (backend != "auto" && on_cpu != (backend != "nccl"))
    throw std::invalid_argument("the parallel backend " + backend + " is not for the device " + options.device);
}

std::string backend_of(const RankOptions& options, const World& world) {
  if (options.device != "cpu") {
    const auto devices = static_cast<int>(torch::cuda::device_count());
    if (devices < world.local_size)
      throw std::invalid_argument(std::to_string(world.local_size) +
                                  " ranks on this host need as many GPUs, but it has " + std::to_string(devices));
    return "nccl";
  }
  if (options.backend == "shm" && !world.one_host())
    throw std::invalid_argument("the parallel backend shm needs all ranks on one host, but " +
                                std::to_string(world.local_size) + " of " + std::to_string(world.size) + " are");
  if (options.backend != "auto") return options.backend;
  return world.one_host() ? "shm" : "gloo";
}

torch::Device device_of(const RankOptions& options, const World& world) {
  if (options.device == "cpu") return torch::kCPU;
  return {torch::kCUDA, static_cast<c10::DeviceIndex>(world.local_rank)};
}

// Rank 0, which starts the others.
std::shared_ptr<Communicator> lead(const RankOptions& options, const World& world, const std::string& backend) {
  struct Led {
    std::shared_ptr<ChildRanks> children;  // outlive the communicator, by whose end they end
    std::shared_ptr<Communicator> ranks;
  };
  const auto led = std::make_shared<Led>();
  ChildRanks::Program program;
  program.command = options.command;
  program.environment = {{kLeader, std::to_string(getpid())},
                         {"WORLD_SIZE", std::to_string(world.size)},
                         {"LOCAL_WORLD_SIZE", std::to_string(world.size)}};
  if (backend == "shm") {
    const auto segment = ShmSegment::create(world.size);
    program.descriptor = segment->descriptor();
    program.environment[kDescriptor] = std::to_string(segment->descriptor());
    led->children = std::make_shared<ChildRanks>(world.size, program);
    for (int rank = 1; rank < world.size; ++rank) segment->expect(rank, led->children->process(rank));
    led->ranks = join_shm(segment, 0, options.timeout);
  } else {
    const Listener listener = listen_at(kLoopback, 0);
    program.environment[kAddress] = kLoopback;
    program.environment[kPort] = std::to_string(listener.port);
    Rendezvous rendezvous{0, world.size, kLoopback, listener.port, listener.descriptor, options.timeout};
    const auto store = std::make_shared<RankStore>(rendezvous);
    led->children = std::make_shared<ChildRanks>(world.size, program);
    const auto children = led->children;
    store->watch([children] { children->check(); });
    led->ranks = join_c10d(store, backend, kLoopback, device_of(options, world));
  }
  return {led, led->ranks.get()};
}

// A child of rank 0.
std::shared_ptr<Communicator> follow_leader(const RankOptions& options, const World& world,
                                            const std::string& backend) {
  if (!live_as_child_of(number_of(kLeader))) std::raise(SIGKILL);  // as if it had ended a moment later
  std::shared_ptr<Communicator> ranks;
  if (backend == "shm") {
    ranks = join_shm(ShmSegment::open(number_of(kDescriptor)), world.rank, options.timeout);
    if (ranks->size() != world.size) throw std::runtime_error("WORLD_SIZE is not that of the leader");
  } else {
    const Rendezvous rendezvous{world.rank,      world.size,     kLoopback, number_of(kPort),
                                /*listener=*/{}, options.timeout};
    ranks = join_c10d(std::make_shared<RankStore>(rendezvous), backend, kLoopback, device_of(options, world));
  }
  for (const char* variable : kOfChildren) unsetenv(variable);  // programs that this one starts are no ranks
  return ranks;
}

// Without a common parent, the segment is opened by a name that it has as long as rank 0 lives.
std::shared_ptr<Communicator> join_shm_of_rank_0(RankStore& store, const World& world, double timeout) {
  std::shared_ptr<ShmSegment> segment;
  std::string name;
  if (world.rank == 0) {
    segment = ShmSegment::create(world.size);
    name = "/proc/" + std::to_string(getpid()) + "/fd/" + std::to_string(segment->descriptor());
  }
  name = store.exchange_texts(name)[0];
  if (world.rank != 0) {
    const int descriptor = ::open(name.c_str(), O_RDWR | O_CLOEXEC);
    if (descriptor < 0)
      throw std::runtime_error(std::string("cannot open the memory of rank 0 (") + std::strerror(errno) +
                               "): use the parallel backend gloo");
    segment = ShmSegment::open(descriptor);
  }
  store.exchange_texts("");  // rank 0 stays until all have it
  return join_shm(segment, world.rank, timeout);
}

// One of torchrun's.
std::shared_ptr<Communicator> join_torchrun(const RankOptions& options, const World& world,
                                            const std::string& backend) {
  static std::atomic<int> groups{0};
  const char* const restart = std::getenv("TORCHELASTIC_RESTART_COUNT");
  const char* const agent = std::getenv("TORCHELASTIC_USE_AGENT_STORE");
  Rendezvous rendezvous{world.rank, world.size, text_of(kAddress), number_of(kPort), {}, options.timeout};
  rendezvous.prefix = std::string("mixtral/") + (restart ? restart : "0") + "/" + std::to_string(groups++) + "/";
  if (world.rank == 0 && (agent == nullptr || std::strcmp(agent, "True") != 0))
    rendezvous.listener = listen_at(rendezvous.address, rendezvous.port).descriptor;
  const auto store = std::make_shared<RankStore>(rendezvous);
  if (backend == "shm") return join_shm_of_rank_0(*store, world, options.timeout);
  const std::string address = world.one_host() ? kLoopback : own_address_towards(rendezvous.address, rendezvous.port);
  if (!world.one_host() && (address == "::1" || address.rfind("127.", 0) == 0) &&
      std::getenv("GLOO_SOCKET_IFNAME") == nullptr)
    throw std::runtime_error("MASTER_ADDR " + rendezvous.address +
                             " is this host's loopback, which other hosts cannot " +
                             "reach: set GLOO_SOCKET_IFNAME to the name of a network interface");
  return join_c10d(store, backend, address, device_of(options, world));
}

// A fork of this process has a copy of it, which is never destroyed there: it would say to the other ranks that this
// one ends, and wait for threads that are not there.
std::shared_ptr<Communicator> kept_by_forks(std::shared_ptr<Communicator> ranks) {
  Communicator* const pointer = ranks.get();
  return {pointer, [ranks = std::move(ranks), process = getpid()](Communicator*) mutable {
            if (process != getpid()) new std::shared_ptr<Communicator>(std::move(ranks));
            ranks.reset();
          }};
}

// The first line in which two texts differ, of each.
std::pair<std::string, std::string> first_difference(const std::string& left, const std::string& right) {
  std::istringstream lines_left(left), lines_right(right);
  for (std::string a, b;;) {
    const bool has_a = static_cast<bool>(std::getline(lines_left, a));
    const bool has_b = static_cast<bool>(std::getline(lines_right, b));
    if (!has_a) a = "nothing";
    if (!has_b) b = "nothing";
    if (a != b || (!has_a && !has_b)) return {a, b};
  }
}

}  // namespace

std::shared_ptr<Communicator> join_ranks(const RankOptions& options) {
  check_options(options);
  const World world = world_of(options);
  if (world.size == 1) return nullptr;
  static std::atomic<bool> is_child{false};
  if (is_child) throw std::runtime_error("a rank that another one has started can hold one model only");
  const std::string backend = backend_of(options, world);
  if (std::getenv("OMP_NUM_THREADS") == nullptr)
    at::set_num_threads(std::max(1, at::get_num_threads() / world.local_size));
  if (!has_place()) return kept_by_forks(lead(options, world, backend));
  if (std::getenv(kLeader) == nullptr) return kept_by_forks(join_torchrun(options, world, backend));
  is_child = true;
  return kept_by_forks(follow_leader(options, world, backend));
}

std::string backend_of(const RankOptions& options) { return backend_of(options, world_of(options)); }

bool is_child_rank() { return std::getenv(kLeader) != nullptr; }

void check_same(Communicator& world, const std::string& description) {
  const std::vector<std::string> texts = world.exchange_texts(description);
  for (size_t rank = 1; rank < texts.size(); ++rank) {
    if (texts[rank] == texts[0]) continue;
    const auto [expected, got] = first_difference(texts[0], texts[rank]);
    throw LoadError("rank " + std::to_string(rank), "", "has " + got + ", but rank 0 has " + expected);
  }
}

void load_together(Communicator& world, const std::function<void()>& load) {
  std::exception_ptr error;
  std::string reason;
  try {
    load();
  } catch (const RankError&) {
    throw;
  } catch (const std::exception& exception) {
    error = std::current_exception();
    reason = exception.what();
    if (reason.empty()) reason = "an error without a reason";
  }
  const std::vector<std::string> reasons = world.exchange_texts(reason);
  if (error) std::rethrow_exception(error);
  for (size_t rank = 0; rank < reasons.size(); ++rank) {
    if (!reasons[rank].empty()) throw LoadError("rank " + std::to_string(rank), "", reasons[rank]);
  }
}

}  // namespace mixtral
