// The CPU threads that operators run on. Includes no torch header.
#pragma once

namespace mixtral {

// Threads of the operators that the calling thread runs: the setting is per thread.
int num_threads();
void use_threads(int count);

}  // namespace mixtral
