// Loops on the threads that operators run on. at::parallel_for is a template that makes one thread do everything when
// its caller is compiled without OpenMP, as this library is: a second OpenMP runtime would stand beside torch's.
#pragma once

#include <cstdint>
#include <functional>

namespace mixtral {

// Calls body(begin, end) for runs of [0, count), each of at least `grain`, on the threads of the calling one. Operators
// inside a body run on its thread alone. If bodies throw, the first exception is thrown here, after all have ended.
void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& body);

}  // namespace mixtral
