#include "pack_weight.h"

#include <atomic>
#include <optional>
#include <string>

#include "../dispatch.h"
#include "../internal_ops.h"
#include "weight_view.h"

namespace mixtral {
namespace {

WeightFormat parse_format(const char* op, const std::optional<std::string>& quantize) {
  if (!quantize) return WeightFormat::kPacked;
  if (*quantize == "int8") return WeightFormat::kInt8;
  if (*quantize == "fp8") return WeightFormat::kFp8;
  MIXTRAL_CHECK(*quantize == "int4", op, ": quantize must be None, \"int8\", \"fp8\" or \"int4\", got \"", *quantize,
                "\"");
  return WeightFormat::kInt4;
}

Tensor empty_packed(const Tensor& weight, WeightFormat format) {
  const int64_t experts = weight.size(0), blocks = weight.size(1) / kBlockRows, depth = weight.size(2);
  const int64_t last = packed_last_size(format, depth);
  switch (format) {
    case WeightFormat::kInt8:
    case WeightFormat::kFp8:
      return new_tensor(weight, {experts, blocks, last},
                        format == WeightFormat::kInt8 ? ScalarType::Char : ScalarType::Float8_e4m3fn);
    case WeightFormat::kInt4:
      return new_tensor(weight, {experts, blocks, depth / kStepDepth, last}, ScalarType::Byte);
    default:
      return new_tensor(weight, {experts, blocks, depth / kStepDepth, last});
  }
}

void check_scales(const char* op, const Tensor& scales, const Tensor& weight,
                  const std::optional<std::string>& quantize) {
  MIXTRAL_CHECK(quantize == "int4", op, ": scales must come with quantize \"int4\", got ",
                quantize ? "\"" + *quantize + "\"" : "None");
  check_rank(op, "scales", scales, 3, "[E, N, Kdim/32]");
  check_dtype(op, "scales", scales, ScalarType::Byte);
  check_size(op, "scales", scales, 0, weight.size(0));
  check_size(op, "scales", scales, 1, weight.size(1));
  check_size(op, "scales", scales, 2, weight.size(2) / kScaleGroup);
  check_same_device(op, "scales", scales, weight);
}

// weight [E, N, Kdim], scales [E, N, Kdim/32] -> packed
Tensor pack_weight(const Tensor& weight, std::optional<std::string> quantize, std::optional<Tensor> scales) {
  constexpr const char* op = "pack_weight";
  const WeightFormat format = parse_format(op, quantize);
  check_rank(op, "weight", weight, 3, "[E, N, Kdim]");
  check_float(op, "weight", weight);
  MIXTRAL_CHECK(!weight.is_cuda(), op, ": weight must be on the cpu (pack there and move the result), got cuda");
  MIXTRAL_CHECK(weight.size(1) % kBlockRows == 0 && weight.size(2) % kStepDepth == 0, op,
                ": weight must have N and Kdim that are multiples of 32, got shape ", shape_string(weight));
  if (scales) check_scales(op, *scales, weight, quantize);
  const Tensor rows = as_contiguous(weight);
  if (scales) scales = as_contiguous(*scales);
  const uint8_t* scale_bytes = scales ? const_ptr<uint8_t>(*scales) : nullptr;
  const Tensor packed = empty_packed(weight, format);
  std::atomic<bool> finite = true;
  dispatch_float(op, weight.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T* from = const_ptr<T>(rows);
    char* to = mutable_ptr<char>(packed);
    const int64_t depth = weight.size(2);
    parallel_rows(weight.size(0) * weight.size(1) / kBlockRows, kBlockRows * depth, [&](int64_t begin, int64_t end) {
      if (!launch_pack_weight_cpu(from, scale_bytes, format, depth, to, begin, end)) finite = false;
    });
  });
  MIXTRAL_CHECK(finite, op, ": weight must be below 2^66 in magnitude to be quantised, got more, inf or NaN");
  return packed;
}

}  // namespace

Tensor internal::unpack_weight(const char* op, const Weight& weight, ScalarType type) {
  const WeightView& view = weight.view;
  const Tensor out = new_tensor(weight.tensor, {view.experts, view.columns, view.depth}, type);
  dispatch_float(op, type, [&](auto tag) {
    using T = decltype(tag);
    const char* from = static_cast<const char*>(view.data);
    T* to = mutable_ptr<T>(out);
    if constexpr (kWithCuda) {
      if (out.is_cuda()) {
        const CudaScope scope(out);
        return check_launch(op, launch_unpack_weight_cuda(view, to, scope.stream()));
      }
    }
    parallel_rows(view.experts * view.columns / kBlockRows, kBlockRows * view.depth, [=](int64_t begin, int64_t end) {
      launch_unpack_weight_cpu(from, view.format, view.depth, to, begin, end);
    });
  });
  return out;
}

namespace {

// packed -> weight [E, N, Kdim]; BFloat16 when quantised
Tensor unpack_weight(const Tensor& packed) {
  constexpr const char* op = "unpack_weight";
  const bool quantized = is_quantized(weight_format(packed));
  if (!quantized) check_float(op, "packed", packed);
  const ScalarType type = quantized ? ScalarType::BFloat16 : packed.scalar_type();
  const Weight weight = as_weight(op, "packed", packed, type, "[E, N/32, Kdim/32, 1024]");
  MIXTRAL_CHECK(weight.view.format != WeightFormat::kPlain, op, ": packed must be a packed weight, got shape ",
                shape_string(packed));
  return internal::unpack_weight(op, weight, type);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixtral, CPU, m) {
  m.impl("pack_weight", TORCH_BOX(&pack_weight));
  m.impl("unpack_weight", TORCH_BOX(&unpack_weight));
}

#ifdef MIXTRAL_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mixtral, CUDA, m) {
  m.impl("pack_weight", TORCH_BOX(&pack_weight));
  m.impl("unpack_weight", TORCH_BOX(&unpack_weight));
}
#endif

}  // namespace mixtral
