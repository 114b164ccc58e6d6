// Asks before it allocates: a model that does not fit is an error with numbers in it, not a killed process.
#pragma once

#include <c10/core/Device.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace mixtral {

struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Bytes this process can still allocate on `device`, those included that torch holds there for tensors to come.
int64_t available_memory(c10::Device device);

// Throws OutOfMemory: "<what>: needs X GiB on <device>, Y GiB available".
void check_memory(const std::string& what, double bytes, c10::Device device);
std::string out_of_memory_text(const std::string& what, double bytes, c10::Device device, double available);
std::string gib_text(double bytes);  // "1.50 GiB"

// Gives the free memory of the C library's heap back to the system, as far as the library has a way to.
void release_free_memory();
// Asks the system for large pages where there is nothing yet: weights are read faster with fewer of them to look up.
// Where it has none to give, nothing changes.
void advise_huge_pages(void* begin, size_t bytes);

}  // namespace mixtral
