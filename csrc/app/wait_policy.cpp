// How OpenMP's threads wait for each other at the end of an operator.
//
// GNU's OpenMP spins for milliseconds by default. When another program needs one of the cores, the scheduler sees two
// busy threads, leaves them where they are, and an operator takes a time slice instead of microseconds: decoding is 3
// to 20 times slower. A thread that soon falls asleep lets the other one have its core; on idle cores this costs
// nothing that can be measured (docs/cpu.md).
//
// OpenMP reads its variables in a constructor of its library, before main(). So the program starts itself once more
// with the variable set. It does so before any constructor runs: those of torch take most of the time of a start.
#include <unistd.h>

#include <cstring>

namespace {

constexpr int kMostVariables = 4096;
char spin_count[] = "GOMP_SPINCOUNT=1000";

bool begins_with(const char* text, const char* start) { return std::strncmp(text, start, std::strlen(start)) == 0; }

void restart_with_short_waits(int, char** argv, char** environment) {
  char* extended[kMostVariables + 2];
  int count = 0;
  for (; environment[count] != nullptr; ++count) {
    if (begins_with(environment[count], "GOMP_SPINCOUNT=") || begins_with(environment[count], "OMP_WAIT_POLICY="))
      return;
    if (count == kMostVariables) return;
    extended[count] = environment[count];
  }
  extended[count] = spin_count;
  extended[count + 1] = nullptr;
  char program[4096] = {};  // not the link itself: its name would be that of the process
  if (readlink("/proc/self/exe", program, sizeof program - 1) <= 0) return;
  execve(program, argv, extended);  // returns only if it fails; the program then runs as it is
}

__attribute__((section(".preinit_array"), used)) void (*const before_constructors)(int, char**,
                                                                                   char**) = restart_with_short_waits;

}  // namespace
