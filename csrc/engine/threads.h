// The CPU threads that operators run on. Includes no torch header.
#pragma once

namespace mixtral {

// Threads of the operators that the calling thread runs: the setting is per thread.
int num_threads();
void use_threads(int count);

// Ends the idle workers that OpenMP keeps for the calling thread; its next operator starts them again. Where workers of
// several threads together outnumber the cores, libgomp lets all of them sleep as soon as they wait, and each operator
// waits for them to wake up.
void release_idle_workers();

}  // namespace mixtral
