#include "library_exit.h"

#include <unistd.h>

#include <cstdlib>

#include "errors.h"

namespace mixtral::app {

void map_library_exits() {
  on_exit(
      [](int status, void*) {
        if (status == EXIT_FAILURE) _exit(kOutOfMemory);
      },
      nullptr);
}

}  // namespace mixtral::app
