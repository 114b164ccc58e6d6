# The LibTorch inside the installed torch package, as imported targets: libtorch::headers, libtorch::cpu, libtorch::cuda,
# libtorch::python. Sets MIXTRAL_WITH_CUDA and enables the CUDA language.
#
# find_package(Torch) is not used: on a CUDA build of torch it fails where no toolkit is installed, and the CPU side of
# this project must build there too.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
          "import importlib.metadata as m, importlib.util as u, os; print(os.path.dirname(u.find_spec('torch').origin), m.version('torch'), sep=';')"
  OUTPUT_VARIABLE torch_info OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE torch_missing ERROR_QUIET)
if(torch_missing)
  message(FATAL_ERROR "torch is not installed for ${Python_EXECUTABLE}: run pip install 'torch==2.11.*' or pass -DPython_EXECUTABLE")
endif()
list(GET torch_info 0 TORCH_DIR)
list(GET torch_info 1 TORCH_VERSION)
if(NOT TORCH_VERSION MATCHES "^2\\.11\\.")
  message(FATAL_ERROR "torch 2.11 is needed, found ${TORCH_VERSION} in ${TORCH_DIR}")
endif()

# In the package, libraries sit beside each other and beside torch, the binary in a folder below; in the source tree torch
# is where it was found.
set(CMAKE_BUILD_RPATH_USE_ORIGIN ON)
set(CMAKE_BUILD_RPATH "\$ORIGIN" "\$ORIGIN/.." "\$ORIGIN/../torch/lib" "\$ORIGIN/../../torch/lib" "${TORCH_DIR}/lib")

include(${CMAKE_CURRENT_LIST_DIR}/LibTorchTargets.cmake)

set(MIXTRAL_WITH_CUDA OFF)
if(NOT MIXTRAL_CUDA STREQUAL "OFF")
  # The architectures are written as for torch ("9.0a"); CMake wants "90a".
  string(REGEX REPLACE "\\." "" CMAKE_CUDA_ARCHITECTURES "${TORCH_CUDA_ARCH_LIST}")
  list(TRANSFORM CMAKE_CUDA_ARCHITECTURES APPEND "-real")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER AND EXISTS "${TORCH_DIR}/lib/libtorch_cuda.so")
    set(CMAKE_CUDA_STANDARD 17)
    enable_language(CUDA)
    find_package(CUDAToolkit REQUIRED)
    set(MIXTRAL_WITH_CUDA ON)
  elseif(MIXTRAL_CUDA STREQUAL "ON")
    message(FATAL_ERROR "MIXTRAL_CUDA=ON needs nvcc and a CUDA build of torch")
  endif()
endif()
message(STATUS "torch ${TORCH_VERSION} in ${TORCH_DIR}; CUDA kernels: ${MIXTRAL_WITH_CUDA}")
