#include <cuda_runtime_api.h>

#include "../dispatch.h"

namespace mixtral {

CudaScope::CudaScope(const Tensor& t) : guard_(t.get_device_index()) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  stream_ = static_cast<cudaStream_t>(stream);
}

void check_launch(const char* op, int error) {
  MIXTRAL_CHECK(error == cudaSuccess, op,
                ": CUDA launch failed: ", cudaGetErrorString(static_cast<cudaError_t>(error)));
}

}  // namespace mixtral
