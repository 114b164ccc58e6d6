#pragma once

namespace mixtral::app {

// From here on, exit(1) called by a library ends the program with kOutOfMemory: libgomp has no other way to say that it
// could not start a thread. This program itself never exits with 1.
void map_library_exits();

}  // namespace mixtral::app
