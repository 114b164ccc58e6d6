// The tensor maps of the grouped GEMM of few rows: for its launchers, and for the program that asks the driver for one
// of each kind (tests/cuda/tensor_maps.cu).
#pragma once

#include "grouped_gemm_stream_hopper.cuh"

namespace mixtral::cuda {

constexpr MapElement map_element(int bytes) { return bytes == 2 ? MapElement::kBFloat16 : MapElement::kByte; }

// b [E, rows of weights, Kdim], plain or fp8
template <typename Weights, typename Shape>
bool encode_weights(TensorMap* map, const void* b, const StreamGemm& gemm, bool swiglu) {
  const auto boxes = stream_weight_boxes(gemm, swiglu, Shape::kGroups * kStreamTileRows, Weights::kFormat);
  return encode_tensor_map<4>(map, b, map_element(Weights::kTokenBytes), boxes.sizes, boxes.strides, boxes.box);
}

// a [M, Kdim]; the boxes that a unit may need
template <typename Weights, typename Shape>
bool encode_tokens(TokenMaps* maps, const void* a, const StreamGemm& gemm) {
  constexpr int kBytes = Weights::kTokenBytes;
  const int largest = token_box(gemm.rows < Shape::kRows ? gemm.rows : Shape::kRows);
  bool made = true;
  for (int box = 0; box <= largest; ++box)
    made &= encode_tensor_map<2>(&maps->boxes[box], a, map_element(kBytes), {gemm.depth, gemm.rows},
                                 {gemm.depth * kBytes}, {kSwizzleRowBytes / kBytes, 8 << box});
  return made;
}

}  // namespace mixtral::cuda
