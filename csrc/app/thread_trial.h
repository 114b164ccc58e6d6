#pragma once

#include <cstdint>

namespace mixtral::app {

// Starts `count` threads and ends them. Throws std::system_error when the system starts fewer: torch would wait for
// ever for threads of its pool that do not start.
void try_threads(int64_t count);

}  // namespace mixtral::app
