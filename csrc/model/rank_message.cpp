#include "rank_message.h"

#include <algorithm>
#include <array>
#include <stdexcept>

namespace mixtral {
namespace {

constexpr int64_t kMagic = 0x3147534d4c58494d;    // "MIXLMSG1"
constexpr int64_t kHeaderWords = 6;               // magic, number, command, words, their checksum, the header's
constexpr int64_t kMostWords = int64_t{1} << 28;  // 2 GiB

void check(bool condition, int64_t number, const std::string& reason) {
  if (!condition) throw std::runtime_error("message " + std::to_string(number) + " of rank 0 " + reason);
}

torch::Tensor tensor_of(const std::vector<int64_t>& words, torch::Device device) {
  return torch::tensor(words, torch::kInt64).to(device);
}

std::vector<int64_t> receive_words(Communicator& world, int64_t count) {
  const auto received = torch::empty({count}, torch::dtype(torch::kInt64).device(world.device()));
  world.receive(received, /*from=*/0);
  const auto words = received.cpu();
  return {words.data_ptr<int64_t>(), words.data_ptr<int64_t>() + count};
}

int64_t checksum(const int64_t* words, int64_t count) {
  return crc32(words, static_cast<size_t>(count) * sizeof(int64_t));
}

void append_words(std::vector<int64_t>& words, const torch::Tensor& tensor) {
  if (!tensor.defined()) return;
  const auto values = tensor.to(torch::kCPU, torch::kInt64).contiguous();
  words.insert(words.end(), values.data_ptr<int64_t>(), values.data_ptr<int64_t>() + values.numel());
}

// Takes the words of a message one after the other.
class MessageReader {
 public:
  MessageReader(const std::vector<int64_t>& words, torch::Device device)
      : all_(tensor_of(words, device)), words_(words) {}

  int64_t word() {
    take(1);
    return words_[static_cast<size_t>(next_ - 1)];
  }
  torch::Tensor words(int64_t count) {
    take(count);
    return all_.narrow(0, next_ - count, count);
  }
  void end() const {
    if (next_ != all_.size(0)) throw std::runtime_error(kBadSizes);
  }

 private:
  static constexpr const char* kBadSizes = "a message of rank 0 has sizes that do not fit each other";

  void take(int64_t count) {
    if (count < 0 || count > all_.size(0) - next_) throw std::runtime_error(kBadSizes);
    next_ += count;
  }

  torch::Tensor all_;
  const std::vector<int64_t>& words_;
  int64_t next_ = 0;
};

}  // namespace

uint32_t crc32(const void* data, size_t bytes) {
  static const auto table = [] {
    std::array<uint32_t, 256> table;
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t value = i;
      for (int bit = 0; bit < 8; ++bit) value = value & 1 ? 0xEDB88320u ^ (value >> 1) : value >> 1;
      table[i] = value;
    }
    return table;
  }();
  uint32_t crc = ~0u;
  const auto* byte = static_cast<const unsigned char*>(data);
  for (const auto* end = byte + bytes; byte != end; ++byte) crc = table[(crc ^ *byte) & 0xFF] ^ (crc >> 8);
  return ~crc;
}

std::vector<torch::Tensor> encode_message(const RankMessage& message, int64_t number, torch::Device device) {
  const auto count = static_cast<int64_t>(message.words.size());
  std::vector<int64_t> header = {kMagic, number, static_cast<int64_t>(message.command), count,
                                 checksum(message.words.data(), count)};
  header.push_back(checksum(header.data(), kHeaderWords - 1));
  std::vector<torch::Tensor> parts = {tensor_of(header, device)};
  if (count > 0) parts.push_back(tensor_of(message.words, device));
  return parts;
}

RankMessage receive_message(Communicator& world, int64_t number) {
  const auto header = receive_words(world, kHeaderWords);
  check(header[0] == kMagic && header[5] == checksum(header.data(), kHeaderWords - 1), number,
        "is damaged: the checksum of its header differs");
  check(header[1] == number, number, "is not the next one: its number is " + std::to_string(header[1]));
  const int64_t command = header[2], count = header[3];
  check(static_cast<int64_t>(Command::kForward) <= command && command <= static_cast<int64_t>(Command::kStop), number,
        "has an unknown command " + std::to_string(command));
  check(0 <= count && count <= kMostWords, number, "has a bad size of " + std::to_string(count) + " words");
  RankMessage message{static_cast<Command>(command), {}};
  if (count > 0) message.words = receive_words(world, count);
  check(header[4] == checksum(message.words.data(), count), number, "is damaged: its checksum differs");
  return message;
}

// sizes, zeroed pages, the batch's tensors, for each number of experts: itself, the number of rows, the rows; and the
// forced experts
std::vector<int64_t> encode_pass(const EncodedPass& pass) {
  const Batch& batch = pass.batch;
  const bool cached = batch.page_table.defined(), forces = pass.forced.defined();
  std::vector<int64_t> words = {pass.cache,
                                batch.input_ids.size(0),
                                batch.cu_seqlens.size(0) - 1,
                                cached ? batch.page_table.size(1) : 0,
                                batch.experts_per_token,
                                pass.records_routing,
                                pass.keeps_logits,
                                forces ? pass.forced.size(0) : 0,
                                forces ? pass.forced.size(2) : 0,
                                static_cast<int64_t>(pass.zeroed.size()),
                                static_cast<int64_t>(batch.rows_by_experts.size())};
  words.insert(words.end(), pass.zeroed.begin(), pass.zeroed.end());
  for (const auto* part :
       {&batch.input_ids, &batch.positions, &batch.cu_seqlens, &batch.slot_mapping, &batch.kv_lens, &batch.page_table})
    append_words(words, *part);
  for (const auto& [experts, rows] : batch.rows_by_experts) {
    words.insert(words.end(), {experts, rows.size(0)});
    append_words(words, rows);
  }
  append_words(words, pass.forced);
  return words;
}

EncodedPass decode_pass(const std::vector<int64_t>& words, torch::Device device) {
  MessageReader reader(words, device);
  EncodedPass pass;
  Batch& batch = pass.batch;
  pass.cache = reader.word();
  const int64_t tokens = reader.word(), sequences = reader.word(), columns = reader.word();
  batch.experts_per_token = reader.word();
  pass.records_routing = reader.word() != 0;
  pass.keeps_logits = reader.word() != 0;
  const int64_t forced_layers = reader.word(), forced_experts = reader.word();
  const int64_t zeroed = reader.word(), groups = reader.word();
  for (int64_t i = 0; i < zeroed; ++i) pass.zeroed.push_back(reader.word());
  batch.input_ids = reader.words(tokens);
  batch.positions = reader.words(tokens);
  batch.cu_seqlens = reader.words(sequences + 1);
  batch.offs = batch.cu_seqlens.narrow(0, sequences, 1);
  if (columns > 0) {
    batch.slot_mapping = reader.words(tokens);
    batch.kv_lens = reader.words(sequences);
    batch.page_table = reader.words(sequences * columns).view({sequences, columns});
  }
  for (int64_t i = 0; i < groups; ++i) {
    const int64_t experts = reader.word(), rows = reader.word();
    batch.rows_by_experts[experts] = reader.words(rows);
  }
  if (forced_layers > 0)
    pass.forced = reader.words(forced_layers * tokens * forced_experts)
                      .view({forced_layers, tokens, forced_experts})
                      .to(torch::kInt32);
  reader.end();
  return pass;
}

}  // namespace mixtral
