// Launchers of the grouped GEMM of few rows: tensor maps and grid, from shapes alone.
#include "../cuda/tensor_map.cuh"
#include "../cuda/wgmma.cuh"
#include "grouped_gemm_stream_hopper.cuh"

namespace mixtral {
namespace {

using namespace cuda;

bool encode_tokens(TokenMaps* maps, const GroupedGemm<BFloat16>& gemm) {
  for (int box = 0; box < kTokenBoxes; ++box) {
    if (!encode_tensor_map<2>(&maps->boxes[box], gemm.a, MapElement::kBFloat16, {gemm.b.depth, gemm.rows},
                              {gemm.b.depth * 2}, {kStreamDepth, 8 << box}))
      return false;
  }
  return true;
}

template <typename Shape, bool kSwiglu>
int launch(const GroupedGemm<BFloat16>& gemm, cudaStream_t stream) {
  const StreamGemm problem{gemm.out,    gemm.offs, gemm.b.experts, gemm.rows, gemm.b.columns / (kSwiglu ? 2 : 1),
                           gemm.b.depth};
  TensorMap weights;
  TokenMaps tokens;
  const StreamWeightBoxes boxes = stream_weight_boxes(problem, kSwiglu, Shape::kGroups * kStreamTileRows, kStreamDepth);
  if (!encode_tensor_map<4>(&weights, gemm.b.data, MapElement::kBFloat16, boxes.sizes, boxes.strides, boxes.box) ||
      !encode_tokens(&tokens, gemm))
    return cudaErrorInvalidValue;
  const auto kernel = grouped_gemm_stream_kernel<Shape, kSwiglu>;
  constexpr int kSharedBytes = sizeof(StreamShared<Shape>);
  int device = 0, processors = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device))
    return error;
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes))
    return error;
  const int64_t units = max_stream_units(problem, Shape::kRows, Shape::columns(kSwiglu));
  const int64_t resident = static_cast<int64_t>(processors) * Shape::kBlocksPerSm;
  cudaLaunchAttribute overlap;  // with the kernel before: programmatic dependent launch
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(units < resident ? units : resident));
  config.blockDim = dim3(Shape::kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, weights, tokens, problem);
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

bool takes_grouped_gemm_stream_hopper(const GroupedGemm<BFloat16>& gemm, bool swiglu) {
  return gemm.b.format == WeightFormat::kPlain && gemm.rows <= kMaxStreamRows && gemm.b.depth > 0 &&
         gemm.b.depth % 8 == 0 && gemm.b.columns % (swiglu ? 16 : 8) == 0 && aligned(gemm.a) && aligned(gemm.b.data) &&
         aligned(gemm.out);
}

int launch_grouped_gemm_stream_hopper(const GroupedGemm<BFloat16>& gemm, bool swiglu, cudaStream_t stream) {
  if (gemm.rows == 0 || gemm.b.columns == 0) return cudaSuccess;
  if (gemm.rows <= FewRows::kRows)
    return swiglu ? launch<FewRows, true>(gemm, stream) : launch<FewRows, false>(gemm, stream);
  return swiglu ? launch<MoreRows, true>(gemm, stream) : launch<MoreRows, false>(gemm, stream);
}

}  // namespace mixtral
