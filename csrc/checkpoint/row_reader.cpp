#include "row_reader.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <exception>
#include <mutex>
#include <numeric>

#include "../io/ggml_type.h"
#include "../io/load_error.h"
#include "../model/parallel.h"
#include "../ops/cpu/shared_work.h"
#include "../ops/host_device.h"
#include "weights.h"

namespace mixtral {
namespace {

constexpr int64_t kPartBytes = 256 << 10;    // with what it becomes, these fit the cache of a core
constexpr int64_t kCudaPartBytes = 4 << 20;  // copies to a GPU are slow when they are short
constexpr int64_t kProgressBytes = 64 << 20;

// f32 [count,cols] of `count` rows of quantised blocks
torch::Tensor dequantized(const std::string& dtype, const void* blocks, int64_t count, int64_t cols,
                          int64_t row_bytes) {
  const auto rows = torch::empty({count, cols}, torch::kFloat32);
  for (int64_t row = 0; row < count; ++row) {
    dequantize_ggml(dtype, static_cast<const uint8_t*>(blocks) + row * row_bytes, cols,
                    rows.data_ptr<float>() + row * cols);
  }
  return rows;
}

// rows [n,cols], the first of which is `first_row` of the tensor
void check_finite(const StoredRows& stored, const torch::Tensor& rows, int64_t first_row) {
  const torch::Tensor wrong = torch::isfinite(rows).logical_not_();
  if (!wrong.any().item<bool>()) return;
  const torch::Tensor place = wrong.nonzero()[0];  // [2]
  const auto row = place[0].item<int64_t>(), col = place[1].item<int64_t>();
  throw LoadError(stored.file.path(), stored.slice.tensor,
                  std::string("holds ") + (rows[row][col].isnan().item<bool>() ? "NaN" : "inf") + " in row " +
                      std::to_string(first_row + row) + ", column " + std::to_string(col));
}

torch::Tensor pack(const StoredRows& stored, const torch::Tensor& rows, Packing packing, torch::ScalarType type) {
  if (packing == Packing::kFloat) return pack_rows(rows.to(type), packing);
  try {
    return pack_rows(rows, packing);
  } catch (const std::exception&) {  // rare, and then the reason is searched for
    if (torch::isfinite(rows).all().item<bool>()) throw;
    throw LoadError(stored.file.path(), stored.slice.tensor, "must be finite to be quantised, got inf or NaN");
  }
}

// Calls run(part) for the parts [begin, end), which the threads of the calling one take in their order, many at first
// and then few: neighbouring parts lie in one large page, which two threads should not both bring into being. Rethrows
// what the first part threw that failed.
template <typename F>
void for_parts(int64_t begin, int64_t end, const F& run) {
  const int64_t threads = at::get_num_threads();
  cpu::SharedWork work(end - begin, threads, 1);
  std::mutex mutex;
  int64_t failed = end;
  std::exception_ptr error;
  parallel_for(threads, 1, [&](int64_t, int64_t) {
    const torch::NoGradGuard no_grad;  // a setting of each thread
    for (auto share = work.take(); share.begin < share.end; share = work.take()) {
      for (int64_t part = begin + share.begin; part < begin + share.end; ++part) {
        try {
          run(part);
        } catch (...) {
          const std::lock_guard<std::mutex> lock(mutex);
          if (part < failed) error = std::current_exception();
          failed = std::min(failed, part);
          return;  // the parts before this one are with some thread already
        }
      }
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace

// What the parts of one slice have in common.
struct RowReader::Job {
  const StoredRows& stored;
  const Packing packing;
  const torch::Tensor& out;
  const int64_t block;      // rows of a packed block; 1: not packed
  const int64_t row_bytes;  // in the file
  int64_t step = 0;         // rows of a part
  bool direct = false;      // the bytes of the file are those of the parameter
};

void RowReader::read(const StoredRows& stored, Packing packing, const torch::Tensor& out) {
  const WeightSlice& slice = stored.slice;
  const int64_t rows = slice.rows(), out_rows = slice.transposed ? slice.cols() : rows;
  const auto bytes = static_cast<int64_t>(stored.entry.end - stored.entry.begin);
  Job job{stored, packing, out, packing == Packing::kNone ? 1 : out_rows / out.size(0), bytes / rows};
  const int64_t group = slice.transposed ? rows : std::lcm(std::max<int64_t>(slice.interleaved_head_dim, 1), job.block);
  const int64_t part_bytes = out.is_cpu() ? kPartBytes : kCudaPartBytes;
  job.step = std::max<int64_t>(part_bytes / (job.row_bytes * group), 1) * group;
  job.direct = out.is_cpu() && out.scalar_type() == stored.type && slice.interleaved_head_dim == 0 && job.block == 1 &&
               !(adapter_ && adapter_->changes(slice.parameter)) && !is_ggml_quantized(stored.entry.dtype) &&
               !slice.transposed;
  staging_.resize(static_cast<size_t>(at::get_num_threads()));
  const int64_t parts = ceil_div(rows, job.step),
                turn = std::max<int64_t>(kProgressBytes / (job.step * job.row_bytes), 1);
  for (int64_t begin = 0; begin < parts; begin += turn) {
    const int64_t end = std::min(begin + turn, parts);
    const auto run = [&](int64_t part) { read_part(job, part * job.step); };
    if (out.is_cpu() && parts > 1) {
      for_parts(begin, end, run);
    } else {
      for (int64_t part = begin; part < end; ++part) run(part);
    }
    report(static_cast<uint64_t>((std::min(end * job.step, rows) - begin * job.step) * job.row_bytes));
  }
}

void RowReader::read_part(const Job& job, int64_t row) {
  const auto& [file, entry, slice, type] = job.stored;
  const int64_t count = std::min(job.step, slice.rows() - row);
  const auto bytes = static_cast<uint64_t>(count * job.row_bytes);
  const torch::Tensor part = slice.transposed ? job.out : job.out.narrow(0, row / job.block, count / job.block);
  void* to = job.direct ? part.data_ptr() : staging(bytes);
  file.read(entry.begin + static_cast<uint64_t>(row * job.row_bytes), to, bytes);
  const torch::Tensor rows = rows_of_part(job, to, row, count);
  if (job.direct) return;
  part.copy_(job.packing == Packing::kNone ? rows : pack(job.stored, rows, job.packing, job.out.scalar_type()));
}

// bytes: `count` rows of the file from `row` on
torch::Tensor RowReader::rows_of_part(const Job& job, void* bytes, int64_t row, int64_t count) const {
  const auto& [file, entry, slice, type] = job.stored;
  torch::Tensor rows = is_ggml_quantized(entry.dtype)
                           ? dequantized(entry.dtype, bytes, count, slice.cols(), job.row_bytes)
                           : torch::from_blob(bytes, {count, slice.cols()}, type);
  if (check_finite_ && !slice.packed) check_finite(job.stored, rows, slice.first_tensor_row + row);
  if (job.direct) return rows;
  rows = slice.transposed ? rows.t().contiguous() : half_split(rows, slice.interleaved_head_dim);
  if (adapter_ && adapter_->changes(slice.parameter)) {
    rows = rows.to(torch::kFloat32);
    adapter_->merge_into(rows, slice.parameter, slice.first_row + row);
  }
  return rows;
}

void* RowReader::staging(uint64_t bytes) {
  torch::Tensor& buffer = staging_.at(static_cast<size_t>(at::get_thread_num()));
  const auto size = static_cast<int64_t>(bytes);
  if (!buffer.defined() || buffer.numel() < size) buffer = torch::empty({size}, torch::kUInt8);
  return buffer.data_ptr();
}

void RowReader::report(uint64_t bytes) {
  done_ += bytes;
  if (progress_ && (done_ == total_ || done_ - reported_ >= kProgressBytes)) progress_(reported_ = done_, total_);
}

}  // namespace mixtral
