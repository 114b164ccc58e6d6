#include "batch.h"

#include <algorithm>

namespace mixtral {

int64_t round_up_to_power_of_two(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

void HostBatch::add_tokens(const std::vector<int64_t>& ids, int64_t first_position) {
  input_ids.insert(input_ids.end(), ids.begin(), ids.end());
  for (size_t i = 0; i < ids.size(); ++i) positions.push_back(first_position + static_cast<int64_t>(i));
  cu_seqlens.push_back(tokens());
}

void HostBatch::pad(int64_t sequences, int64_t first_slot) {
  const std::vector<int64_t> pages(page_table.begin(), page_table.begin() + columns);
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
  const int64_t size = 2 * tokens + sequences + 1 + (cached ? tokens + sequences * (1 + columns) : 0);
  host_ = torch::empty(size, torch::dtype(torch::kInt64).pinned_memory(device.is_cuda()));
  device_ = device.is_cpu() ? host_ : torch::empty(size, host_.options().device(device).pinned_memory(false));

  int64_t begin = 0;
  const auto take = [&](int64_t count) {
    begin += count;
    return device_.narrow(0, begin - count, count);
  };
  batch_.input_ids = take(tokens);
  batch_.positions = take(tokens);
  batch_.cu_seqlens = take(sequences + 1);
  batch_.offs = batch_.cu_seqlens.narrow(0, sequences, 1);
  if (!cached) return;
  batch_.slot_mapping = take(tokens);
  batch_.kv_lens = take(sequences);
  batch_.page_table = take(sequences * columns).view({sequences, columns});
}

void BatchBuffer::fill(const HostBatch& batch) {
  int64_t* next = host_.data_ptr<int64_t>();
  for (const auto* part :
       {&batch.input_ids, &batch.positions, &batch.cu_seqlens, &batch.slot_mapping, &batch.kv_lens, &batch.page_table})
    next = std::copy(part->begin(), part->end(), next);
  if (!device_.is_cpu()) device_.copy_(host_, /*non_blocking=*/true);
}

Batch packed_batch(const std::vector<std::vector<int64_t>>& sequences, torch::Device device) {
  HostBatch host;
  for (const auto& ids : sequences) host.add_tokens(ids, 0);
  return host.to(device);
}

}  // namespace mixtral
