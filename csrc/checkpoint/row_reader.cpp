#include "row_reader.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <exception>
#include <functional>
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

constexpr int64_t kPieceBytes = 256 << 10;     // with what it becomes, these fit the cache of a core
constexpr int64_t kLargePieceBytes = 4 << 20;  // short copies to a GPU are slow, and so are short direct reads
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

// rows [n,cols], the first of which is row `row` of the part
void check_finite(const StoredRows& stored, const torch::Tensor& rows, int64_t row) {
  const torch::Tensor wrong = torch::isfinite(rows).logical_not_();
  if (!wrong.any().item<bool>()) return;
  const torch::Tensor place = wrong.nonzero()[0];  // [2]
  const auto r = place[0].item<int64_t>(), c = place[1].item<int64_t>();
  throw LoadError(stored.file.path(), stored.slice.tensor,
                  std::string("holds ") + (rows[r][c].isnan().item<bool>() ? "NaN" : "inf") + " in row " +
                      std::to_string(stored.part.first_row + row + r) + ", column " +
                      std::to_string(stored.part.first_column + c));
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

PageRange pages_of(const torch::Tensor& memory) {
  return pages_around(memory.const_data_ptr(), static_cast<uint64_t>(memory.nbytes()));
}

void on_all_threads(const std::function<void()>& body) {
  parallel_for(at::get_num_threads(), 1, [&](int64_t, int64_t) { body(); });
}

// Calls run(piece) for the pieces [begin, end), which the threads of the calling one take in their order, many at
// first, so that each reads and writes neighbouring ones in order, and then few. Rethrows what the first piece threw
// that failed.
template <typename F>
void for_pieces(int64_t begin, int64_t end, const F& run) {
  const int64_t threads = at::get_num_threads();
  cpu::SharedWork work(end - begin, threads, 1);
  std::mutex mutex;
  int64_t failed = end;
  std::exception_ptr error;
  parallel_for(threads, 1, [&](int64_t, int64_t) {
    const torch::NoGradGuard no_grad;  // a setting of each thread
    for (auto share = work.take(); share.begin < share.end; share = work.take()) {
      for (int64_t piece = begin + share.begin; piece < begin + share.end; ++piece) {
        try {
          run(piece);
        } catch (...) {
          const std::lock_guard<std::mutex> lock(mutex);
          if (piece < failed) error = std::current_exception();
          failed = std::min(failed, piece);
          return;  // the pieces before this one are with some thread already
        }
      }
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace

uint64_t StoredRows::bytes_of(int64_t elements) const {
  const auto all_rows =
      std::accumulate(entry.shape.begin(), entry.shape.end(), int64_t{1}, std::multiplies<>()) / part.row_size;
  const uint64_t row = (entry.end - entry.begin) / static_cast<uint64_t>(all_rows);
  return row * static_cast<uint64_t>(elements) / static_cast<uint64_t>(part.row_size);
}

uint64_t StoredRows::row_bytes() const { return bytes_of(part.columns); }

void StoredRows::read(int64_t row, int64_t count, void* to) const {
  const uint64_t stride = bytes_of(part.row_size), bytes = row_bytes();
  const uint64_t begin =
      entry.begin + static_cast<uint64_t>(part.first_row + row) * stride + bytes_of(part.first_column);
  if (bytes == stride) return file.read(begin, to, static_cast<uint64_t>(count) * bytes);
  for (uint64_t r = 0; r < static_cast<uint64_t>(count); ++r)
    file.read(begin + r * stride, static_cast<char*>(to) + r * bytes, bytes);
}

// What the pieces of one part have in common.
struct RowReader::Job {
  const StoredRows& stored;
  const Packing packing;
  const torch::Tensor& out;
  const int64_t block;      // rows of a packed block; 1: not packed
  const int64_t row_bytes;  // in the file
  int64_t step = 0;         // rows of a piece
  bool direct = false;      // the bytes of the file are those of the parameter
};

void RowReader::read(const StoredRows& stored, Packing packing, const torch::Tensor& out) {
  const WeightSlice& slice = stored.slice;
  const int64_t rows = stored.part.rows, out_rows = slice.transposed ? stored.part.columns : rows;
  Job job{stored, packing, out, packing == Packing::kNone ? 1 : out_rows / out.size(0),
          static_cast<int64_t>(stored.row_bytes())};
  const int64_t group = slice.transposed ? rows : std::lcm(std::max<int64_t>(slice.interleaved_head_dim, 1), job.block);
  const bool large = !out.is_cpu() || stored.file.file().reads_directly();
  const int64_t piece_bytes = large ? kLargePieceBytes : kPieceBytes;
  job.step = std::max<int64_t>(piece_bytes / (job.row_bytes * group), 1) * group;
  job.direct = out.is_cpu() && out.scalar_type() == stored.type && slice.interleaved_head_dim == 0 && job.block == 1 &&
               !(adapter_ && adapter_->changes(slice.parameter)) && !is_ggml_quantized(stored.entry.dtype) &&
               !slice.transposed;
  staging_.resize(static_cast<size_t>(at::get_num_threads()));
  const int64_t pieces = ceil_div(rows, job.step),
                turn = std::max<int64_t>(kProgressBytes / (job.step * job.row_bytes), 1);
  for (int64_t begin = 0; begin < pieces; begin += turn) {
    const int64_t end = std::min(begin + turn, pieces);
    const auto run = [&](int64_t piece) { read_piece(job, piece * job.step); };
    const int64_t first_row = begin * job.step, count = std::min(end * job.step, rows) - first_row;
    if (out.is_cpu()) large_pages_.bring(pages_of(rows_of_out(job, first_row, count)), on_all_threads);
    if (out.is_cpu() && pieces > 1) {
      for_pieces(begin, end, run);
    } else {
      for (int64_t piece = begin; piece < end; ++piece) run(piece);
    }
    report(static_cast<uint64_t>(count * job.row_bytes));
  }
}

// What rows [row, row + count) of the part become.
torch::Tensor RowReader::rows_of_out(const Job& job, int64_t row, int64_t count) {
  if (job.stored.slice.transposed) return job.out;  // all rows are one piece
  return job.out.narrow(0, row / job.block, count / job.block);
}

void RowReader::read_piece(const Job& job, int64_t row) {
  const int64_t count = std::min(job.step, job.stored.part.rows - row);
  const torch::Tensor piece = rows_of_out(job, row, count);
  if (piece.is_cpu()) bring_into_being(pages_of(piece));
  void* to = job.direct ? piece.data_ptr() : staging(static_cast<uint64_t>(count * job.row_bytes));
  job.stored.read(row, count, to);
  const torch::Tensor rows = rows_of_piece(job, to, row, count);
  if (job.direct) return;
  piece.copy_(job.packing == Packing::kNone ? rows : pack(job.stored, rows, job.packing, job.out.scalar_type()));
}

// bytes: `count` rows of the part from `row` on
torch::Tensor RowReader::rows_of_piece(const Job& job, void* bytes, int64_t row, int64_t count) const {
  const auto& [file, entry, slice, part, type] = job.stored;
  torch::Tensor rows = is_ggml_quantized(entry.dtype)
                           ? dequantized(entry.dtype, bytes, count, part.columns, job.row_bytes)
                           : torch::from_blob(bytes, {count, part.columns}, type);
  if (check_finite_ && !slice.packed) check_finite(job.stored, rows, row);
  if (job.direct) return rows;
  rows = slice.transposed ? rows.t().contiguous() : half_split(rows, slice.interleaved_head_dim);
  if (adapter_ && adapter_->changes(slice.parameter)) {
    rows = rows.to(torch::kFloat32);
    adapter_->merge_into(rows, slice.parameter, part.parameter_row + row, part.parameter_column);
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
