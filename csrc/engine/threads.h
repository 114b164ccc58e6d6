// The CPU threads that one operator runs on. Includes no torch header.
#pragma once

#include <cstdint>

namespace mixtral {

// Threads of the operators that the calling thread runs: the setting is per thread.
int num_threads();
void use_threads(int count);

// The same for a program that starts with `count` threads. Throws std::system_error when the system starts fewer.
void set_num_threads(int64_t count);

}  // namespace mixtral
