// Rows of a tensor in a file become rows of a parameter, or its packed blocks.
#pragma once

#include <vector>

#include "../io/new_pages.h"
#include "../io/tensor_file.h"
#include "../model/libtorch.h"
#include "../model/packing.h"
#include "load_options.h"
#include "lora.h"
#include "weight_names.h"
#include "weight_parts.h"

namespace mixtral {

// A part of one slice, as it lies in a file.
struct StoredRows {
  const TensorFile& file;
  const TensorEntry& entry;  // of the tensor
  const WeightSlice& slice;
  const WeightPart& part;
  torch::ScalarType type;  // of the values, or what quantised blocks of a GGUF file become

  uint64_t row_bytes() const;  // of the part
  // Rows [row, row + count) of the part.
  void read(int64_t row, int64_t count, void* to) const;
  uint64_t bytes_of(int64_t elements) const;  // of a row of the tensor
};

// Reads parts of slices, each by all threads of the calling one: a thread reads a few rows at a time into a buffer of
// its own, converts and packs them while they are in its cache, and writes them to their place, whose pages it is the
// first to touch.
class RowReader {
 public:
  // total: bytes of all parts, for the progress, which is called by the thread that reads, about every 64 MiB.
  // adapter: merged into what is read; null: none. check_finite: refuse inf and NaN.
  RowReader(const Progress& progress, uint64_t total, const Adapter* adapter, bool check_finite)
      : progress_(progress), total_(total), adapter_(adapter), check_finite_(check_finite) {}

  // out: the rows of the parameter that the part becomes, [rows,cols], on any device; or, with packing, their packed
  // blocks [rows/32,...]. Throws LoadError: the first row in the file that is wrong is named, whatever the threads.
  void read(const StoredRows& stored, Packing packing, const torch::Tensor& out);

 private:
  struct Job;
  static torch::Tensor rows_of_out(const Job& job, int64_t row, int64_t count);
  void read_piece(const Job& job, int64_t row);
  torch::Tensor rows_of_piece(const Job& job, void* bytes, int64_t row, int64_t count) const;
  void* staging(uint64_t bytes);
  void report(uint64_t bytes);

  const Progress& progress_;
  const uint64_t total_;
  const Adapter* const adapter_;
  const bool check_finite_;
  uint64_t done_ = 0, reported_ = 0;
  std::vector<torch::Tensor> staging_;  // one for each thread
  LargePages large_pages_;
};

}  // namespace mixtral
