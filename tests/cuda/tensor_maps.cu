// Asks the driver for a tensor map of every kind that the Hopper kernels make, at the sizes of Mixtral 8x7B, through
// the functions that their launchers call. Nothing is launched. One line for each map; exit status 1 if one is refused.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <string>

#include "ops/grouped_gemm/hopper/grouped_gemm_stream_maps_hopper.cuh"
#include "ops/grouped_gemm/hopper/grouped_gemm_tile_hopper.cuh"
#include "ops/sliding_window_attention/hopper/attention_prefill_loads_hopper.cuh"

namespace mixtral {
namespace {

using namespace cuda;

std::string kind;  // of the maps being made
int made = 0, refused = 0;

template <typename T>
void print_list(const char* name, const T* values, int count) {
  std::printf("; %s", name);
  for (int i = 0; i < count; ++i) std::printf(" %llu", static_cast<unsigned long long>(values[i]));
}

void print_map(const NewTensorMap& map) {
  ++made;
  if (map.answer == CUDA_SUCCESS) {
    std::printf("made: %s", kind.c_str());
  } else {
    ++refused;
    std::printf("refused, CUresult %d: %s", map.answer, kind.c_str());
  }
  print_list("sizes", map.sizes, map.rank);
  print_list("strides", map.strides, map.rank - 1);
  print_list("box", map.box, map.rank);
  std::printf("\n");
}

struct Layer {
  const char* name;
  int64_t experts, columns, depth;  // columns of out
  bool swiglu;
};
constexpr Layer kLayers[] = {{"gate and up", 8, 14336, 4096, true},
                             {"down", 8, 4096, 14336, false},
                             {"q, k and v", 1, 6144, 4096, false},
                             {"logits", 1, 32000, 4096, false}};

std::string named(const std::string& what, const Layer& layer, int64_t rows) {
  return what + ", " + layer.name + ", K " + std::to_string(layer.depth) + ", rows " + std::to_string(rows);
}

template <typename Shape>
StreamGemm stream_gemm(const Layer& layer) {
  return {nullptr, {}, layer.experts, Shape::kRows, layer.columns, layer.depth};
}

// The rows of a in every box that a unit may need.
template <typename Weights, typename Shape>
void make_token_maps(const std::string& format, const void* data, const Layer& layer) {
  TokenMaps tokens;
  kind = named("stream " + format + " tokens", layer, Shape::kRows);
  encode_tokens<Weights, Shape>(&tokens, data, stream_gemm<Shape>(layer));
}

// The same and the weights, which int4 needs no map for.
template <typename Weights, typename Shape>
void make_stream_maps(const std::string& format, const void* data, const Layer& layer) {
  TensorMap weights;
  kind = named("stream " + format + " weights", layer, Shape::kRows);
  encode_weights<Weights, Shape>(&weights, data, stream_gemm<Shape>(layer), layer.swiglu);
  make_token_maps<Weights, Shape>(format, data, layer);
}

void make_gemm_maps(const void* data) {
  for (const Layer& layer : kLayers) {
    make_stream_maps<BFloat16Weights, FewestRows>("bf16", data, layer);
    make_stream_maps<BFloat16Weights, FewRows>("bf16", data, layer);
    make_stream_maps<BFloat16Weights, MoreRows>("bf16", data, layer);
    make_stream_maps<E4m3Weights, FewRows>("fp8", data, layer);
    make_stream_maps<E4m3Weights, MoreE4m3Rows>("fp8", data, layer);
    make_token_maps<Int4Weights, Int4Rows>("int4", data, layer);
    make_token_maps<Int4Weights, MoreInt4Rows>("int4", data, layer);

    const BFloat16* values = static_cast<const BFloat16*>(data);
    GroupedGemm<BFloat16> gemm{};
    gemm.a = values;
    gemm.b.data = data;
    gemm.b.experts = layer.experts, gemm.b.depth = layer.depth;
    gemm.b.columns = layer.columns * (layer.swiglu ? 2 : 1);
    gemm.rows = 4096;
    TensorMap a, b;
    kind = named("tile a and b", layer, gemm.rows);
    encode_gemm_maps(gemm, &a, &b);
  }
}

void make_attention_maps(const void* data) {
  AttentionProblem<BFloat16> problem{};
  problem.q = problem.k = problem.v = static_cast<const BFloat16*>(data);
  problem.tokens = 4096, problem.num_kv_heads = 8, problem.head_dim = 128;
  TensorMap map;
  for (const int64_t group : {1, 4, 6, 8}) {
    problem.num_heads = problem.num_kv_heads * group;
    kind = "prefill queries, " + std::to_string(group) + " heads on a key head";
    prefill::prefill_query_map(&map, problem);
  }
  kind = "prefill packed keys";
  problem.keys.pages = 1, problem.keys.page_size = problem.tokens;
  prefill::prefill_key_map(&map, problem, problem.k);
  const int64_t table = 0;  // that there is one makes the keys paged; it is not read
  problem.keys.page_table = &table;
  for (const int64_t page : {8, 16, 32, 64, 128, 256}) {
    kind = "prefill keys in pages of " + std::to_string(page);
    problem.keys.page_size = page, problem.keys.pages = 4096 / page;
    prefill::prefill_key_map(&map, problem, problem.k);
  }
}

}  // namespace
}  // namespace mixtral

int main() {
  using namespace mixtral;
  void* data = nullptr;
  constexpr size_t kBytes = size_t{2} << 30;  // the largest weight
  if (const cudaError_t error = cudaMalloc(&data, kBytes)) std::printf("no memory: %s\n", cudaGetErrorString(error));
  cuda::observe_new_tensor_map = print_map;
  make_gemm_maps(data);
  make_attention_maps(data);
  std::printf("%d of %d tensor maps refused\n", refused, made);
  return refused > 0 ? 1 : 0;
}
