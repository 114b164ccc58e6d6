// Asks before it allocates: a model that does not fit is an error with numbers in it, not a killed process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <stdexcept>
#include <string>

namespace mixtral {

struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Bytes this process can still allocate on `device` ("cpu", "cuda", "cuda:1"), those included that torch holds there
// for tensors to come.
int64_t available_memory(const std::string& device);
// Bytes that all processes of this host, or container, together can still allocate on the CPU.
int64_t host_memory();
// The limit of a container less the memory in use: of the control groups, of version 1 or 2, that /proc/self/cgroup
// (`groups`) names under `root`, and of those at `root`, which are a container's own. File pages that can be dropped
// count as available. The largest int64 where there is no limit.
int64_t container_memory(const std::filesystem::path& root = "/sys/fs/cgroup",
                         const std::filesystem::path& groups = "/proc/self/cgroup");

// Throws OutOfMemory: "<what>: needs 1.50 GiB on <device>, 1.00 GiB available".
void check_memory(const std::string& what, double bytes, const std::string& device);
std::string out_of_memory_text(const std::string& what, double bytes, const std::string& device, double available);

// Gives the free memory of the C library's heap back to the system, as far as the library has a way to.
void release_free_memory();

}  // namespace mixtral
