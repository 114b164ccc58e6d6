# The LibTorch in the folder TORCH_DIR as imported targets: libtorch::headers, libtorch::cpu, libtorch::cuda,
# libtorch::python. Used by the build, and by find_package(mixtral).
add_library(libtorch::headers INTERFACE IMPORTED)
set_target_properties(libtorch::headers PROPERTIES
  INTERFACE_SYSTEM_INCLUDE_DIRECTORIES "${TORCH_DIR}/include;${TORCH_DIR}/include/torch/csrc/api/include"
  INTERFACE_INCLUDE_DIRECTORIES "${TORCH_DIR}/include;${TORCH_DIR}/include/torch/csrc/api/include")

# torch registers its kernels from static initialisers, so its libraries must stay linked though no symbol asks for them;
# what they need themselves is found by their own RPATH at run time.
function(add_torch_target name)
  add_library(libtorch::${name} INTERFACE IMPORTED)
  list(TRANSFORM ARGN PREPEND "${TORCH_DIR}/lib/lib")
  list(TRANSFORM ARGN APPEND ".so")
  set_target_properties(libtorch::${name} PROPERTIES INTERFACE_LINK_LIBRARIES
    "-Wl,--no-as-needed;${ARGN};-Wl,--as-needed;-Wl,--allow-shlib-undefined")
endfunction()
add_torch_target(cpu c10 torch_cpu)
add_torch_target(cuda c10_cuda torch_cuda)
add_torch_target(python torch_python)
