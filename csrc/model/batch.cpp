#include "batch.h"

#include <algorithm>

namespace mixtral {
namespace {

// int64 elements that `count` int32 values take: every part of the block starts on one.
int64_t pairs(int64_t count) { return (count + 1) / 2; }

template <typename T>
int64_t* put(const std::vector<T>& part, int64_t* begin) {
  std::copy(part.begin(), part.end(), reinterpret_cast<T*>(begin));
  const auto count = static_cast<int64_t>(part.size());
  return begin + (sizeof(T) == sizeof(int64_t) ? count : pairs(count));
}

}  // namespace

int64_t round_up_to_power_of_two(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

void HostBatch::add_tokens(const std::vector<int64_t>& ids, int64_t first_position) {
  input_ids.insert(input_ids.end(), ids.begin(), ids.end());
  for (size_t i = 0; i < ids.size(); ++i) positions.push_back(first_position + static_cast<int64_t>(i));
  cu_seqlens.push_back(static_cast<int32_t>(input_ids.size()));
}

void HostBatch::pad(int64_t sequences, int64_t first_slot) {
  const std::vector<int32_t> pages(page_table.begin(), page_table.begin() + columns);
  while (this->sequences() < sequences) {
    add_tokens({input_ids[0]}, positions[0]);
    slot_mapping.push_back(first_slot++);
    kv_lens.push_back(kv_lens[0]);
    page_table.insert(page_table.end(), pages.begin(), pages.end());
  }
}

Batch HostBatch::to(torch::Device device) const {
  BatchBuffer buffer(tokens(), sequences(), columns, device);
  buffer.fill(*this);
  return buffer.batch();
}

// The order of the parts is that of fill().
BatchBuffer::BatchBuffer(int64_t tokens, int64_t sequences, int64_t columns, torch::Device device) {
  const bool cached = columns > 0;
  const int64_t wide = cached ? 3 * tokens + sequences : 2 * tokens;
  const int64_t size = wide + pairs(sequences + 1) + pairs(sequences * columns);
  host_ = torch::empty(size, torch::dtype(torch::kInt64).pinned_memory(device.is_cuda()));
  device_ = device.is_cpu() ? host_ : torch::empty(size, host_.options().device(device).pinned_memory(false));

  int64_t begin = 0;
  const auto take_int64 = [&](int64_t count) {
    begin += count;
    return device_.narrow(0, begin - count, count);
  };
  const auto take_int32 = [&](int64_t count) {
    return take_int64(pairs(count)).view(torch::kInt32).narrow(0, 0, count);
  };
  batch_.input_ids = take_int64(tokens);
  batch_.positions = take_int64(tokens);
  if (cached) {
    batch_.slot_mapping = take_int64(tokens);
    batch_.kv_lens = take_int64(sequences);
  }
  batch_.cu_seqlens = take_int32(sequences + 1);
  batch_.offs = batch_.cu_seqlens.narrow(0, sequences, 1);
  if (cached) batch_.page_table = take_int32(sequences * columns).view({sequences, columns});
}

void BatchBuffer::fill(const HostBatch& batch) {
  int64_t* next = host_.data_ptr<int64_t>();
  for (const auto* part : {&batch.input_ids, &batch.positions, &batch.slot_mapping, &batch.kv_lens})
    next = put(*part, next);
  for (const auto* part : {&batch.cu_seqlens, &batch.page_table}) next = put(*part, next);
  if (!device_.is_cpu()) device_.copy_(host_, /*non_blocking=*/true);
}

Batch packed_batch(const std::vector<std::vector<int64_t>>& sequences, torch::Device device) {
  HostBatch host;
  for (const auto& ids : sequences) host.add_tokens(ids, 0);
  return host.to(device);
}

}  // namespace mixtral
