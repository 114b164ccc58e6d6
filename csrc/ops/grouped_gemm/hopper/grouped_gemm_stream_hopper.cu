// Launchers of the grouped GEMM of few rows: tensor maps and grid, from shapes alone.
#include <climits>

#include "../../cuda/launch.cuh"
#include "grouped_gemm_stream_hopper.cuh"
#include "grouped_gemm_stream_maps_hopper.cuh"
#include "quantize_rows_hopper.cuh"

namespace mixtral {
namespace {

using namespace cuda;

template <typename Weights, typename Shape, bool kSwiglu>
int launch_kernel(const typename Weights::Source& weights, const void* a, const StreamGemm& gemm, cudaStream_t stream) {
  TokenMaps tokens = {};
  if (!encode_tokens<Weights, Shape>(&tokens, a, gemm)) return cudaErrorInvalidValue;
  const auto kernel = grouped_gemm_stream_kernel<Weights, Shape, kSwiglu>;
  constexpr int kSharedBytes = sizeof(StreamShared<Weights, Shape>);
  int device = 0, processors = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device))
    return error;
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes))
    return error;
  const int64_t units = max_stream_units(gemm, Shape::kRows, Shape::columns(kSwiglu));
  const int64_t resident = static_cast<int64_t>(processors) * Shape::kBlocksPerSm;
  return launch_overlapping(kernel, static_cast<unsigned>(units < resident ? units : resident), Shape::kThreads,
                            kSharedBytes, stream, weights, tokens, gemm);
}

template <typename Weights, typename Shape>
int launch(const typename Weights::Source& weights, const void* a, const StreamGemm& gemm, bool swiglu,
           cudaStream_t stream) {
  if (gemm.rows == 0 || gemm.columns == 0) return cudaSuccess;
  return swiglu ? launch_kernel<Weights, Shape, true>(weights, a, gemm, stream)
                : launch_kernel<Weights, Shape, false>(weights, a, gemm, stream);
}

StreamGemm stream_gemm(const GroupedGemm<BFloat16>& gemm, const RoutedRows& routed, bool swiglu) {
  const int64_t columns = gemm.b.columns / (swiglu ? 2 : 1);
  return {gemm.out, gemm.offs, gemm.b.experts, gemm.rows, columns, gemm.b.depth, routed};
}

template <typename Shape>
int launch_bf16(const GroupedGemm<BFloat16>& gemm, const StreamGemm& problem, bool swiglu, cudaStream_t stream) {
  TensorMap weights;
  if (!encode_weights<BFloat16Weights, Shape>(&weights, gemm.b.data, problem, swiglu)) return cudaErrorInvalidValue;
  return launch<BFloat16Weights, Shape>(weights, gemm.a, problem, swiglu, stream);
}

template <typename Shape>
int launch_e4m3(const GroupedGemm<BFloat16>& gemm, const E4m3Rows& a, const StreamGemm& problem, bool swiglu,
                cudaStream_t stream) {
  E4m3Weights::Source weights{{}, static_cast<const char*>(gemm.b.data), a.scales};
  if (!encode_weights<E4m3Weights, Shape>(&weights.map, gemm.b.data, problem, swiglu)) return cudaErrorInvalidValue;
  return launch<E4m3Weights, Shape>(weights, a.values, problem, swiglu, stream);
}

// Every SM has units of 128 rows of int4 weights, or the rows are too many to unpack weights for every 32 of them.
bool has_more_int4_rows(const GroupedGemm<BFloat16>& gemm) {
  constexpr int64_t kProcessors = 132, kFewRows = Int4Rows::kRows, kManyRows = 256;  // rows: an expert's
  const bool many_units = gemm.b.experts * gemm.b.columns >= kProcessors * 2 * kStreamTileRows;
  return gemm.rows > (many_units ? kFewRows : kManyRows) * gemm.b.experts;
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

bool takes_grouped_gemm_stream_hopper(const GroupedGemm<BFloat16>& gemm, bool swiglu) {
  const WeightView& b = gemm.b;
  const int halves = swiglu ? 2 : 1;
  if (b.depth == 0 || !aligned(gemm.a) || !aligned(b.data) || !aligned(gemm.out)) return false;
  if (gemm.rows > INT_MAX / 2 || b.columns > INT_MAX / 2 || b.depth > INT_MAX / 2 || b.experts > INT_MAX / 2)
    return false;
  if (max_gemm_tiles(b.experts, gemm.rows, FewestRows::kRows, ceil_div(b.columns, 32)) > INT_MAX) return false;
  if (b.format == WeightFormat::kFp8 || b.format == WeightFormat::kInt4) return b.columns % (halves * kBlockRows) == 0;
  return b.format == WeightFormat::kPlain && gemm.rows <= kMaxStreamRows && b.depth % 8 == 0 &&
         b.columns % (halves * 8) == 0;
}

bool takes_routed_gemm_stream_hopper(const GroupedGemm<BFloat16>& gemm, int64_t copies, bool swiglu) {
  const int most = gemm.b.format == WeightFormat::kInt4 ? Int4Rows::kRows : FewRows::kRows;
  return gemm.rows <= most && gemm.rows * copies <= kMaxRoutedCopies && takes_grouped_gemm_stream_hopper(gemm, swiglu);
}

int launch_grouped_gemm_stream_hopper(const GroupedGemm<BFloat16>& gemm, const RoutedRows& routed, bool swiglu,
                                      cudaStream_t stream) {
  if (gemm.rows == 0 || gemm.b.columns == 0) return cudaSuccess;
  const StreamGemm problem = stream_gemm(gemm, routed, swiglu);
  if (gemm.b.format == WeightFormat::kInt4) {
    const Int4Weights::Source weights{static_cast<const char*>(gemm.b.data)};
    return has_more_int4_rows(gemm) ? launch<Int4Weights, MoreInt4Rows>(weights, gemm.a, problem, swiglu, stream)
                                    : launch<Int4Weights, Int4Rows>(weights, gemm.a, problem, swiglu, stream);
  }
  if (gemm.rows <= FewestRows::kRows) return launch_bf16<FewestRows>(gemm, problem, swiglu, stream);
  if (gemm.rows <= FewRows::kRows) return launch_bf16<FewRows>(gemm, problem, swiglu, stream);
  return launch_bf16<MoreRows>(gemm, problem, swiglu, stream);
}

int launch_quantize_rows_hopper(const BFloat16* a, const E4m3Rows& out, int64_t rows, int64_t depth,
                                cudaStream_t stream) {
  if (rows == 0 || depth == 0) return cudaSuccess;
  return launch_overlapping(quantize_rows_kernel, static_cast<unsigned>(ceil_div(rows, kE4m3Warps)),
                            kE4m3Warps * kWarpSize, 0, stream, a, out, rows, depth);
}

int launch_grouped_gemm_stream_e4m3_hopper(const GroupedGemm<BFloat16>& gemm, const E4m3Rows& a,
                                           const RoutedRows& routed, bool swiglu, cudaStream_t stream) {
  if (gemm.rows == 0 || gemm.b.columns == 0) return cudaSuccess;
  const StreamGemm problem = stream_gemm(gemm, routed, swiglu);
  return gemm.rows <= FewRows::kRows ? launch_e4m3<FewRows>(gemm, a, problem, swiglu, stream)
                                     : launch_e4m3<MoreE4m3Rows>(gemm, a, problem, swiglu, stream);
}

}  // namespace mixtral
