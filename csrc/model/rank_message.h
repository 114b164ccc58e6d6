// What rank 0 tells the other ranks: which command to carry out, and with which numbers. A checksum and a count reveal
// a message that was damaged, lost or repeated, before anything is done with it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../distributed/communicator.h"
#include "batch.h"
#include "libtorch.h"

namespace mixtral {

enum class Command : int64_t {
  kForward = 1,  // the words of encode_pass(): compute the layers of the own stage
  kLogits,       // {rows}: receive so many rows of hidden states, and compute the own part of the logits
  kMakeCache,    // {number, page size, pages, longest chunk, padding tokens, dtype}: a key/value cache
  kDropCache,    // {number}
  kPing,         // {}: send one int64 back, any
  kWeightHash,   // {}: send the one of sampled_weights() back
  kStop,         // {}
};

struct RankMessage {
  Command command;
  std::vector<int64_t> words;
};

// The tensors that are sent to one rank. number: how many messages it was sent before; device: the communicator's.
std::vector<torch::Tensor> encode_message(const RankMessage& message, int64_t number, torch::Device device);
// Receives them from rank 0. Throws std::runtime_error for a message that is damaged, or not the next one.
RankMessage receive_message(Communicator& world, int64_t number);

// A pass that all ranks compute.
struct EncodedPass {
  int64_t cache = -1;           // its number; -1: none
  std::vector<int64_t> zeroed;  // pages of the cache that become zero before
  Batch batch;                  // without its pointers
  bool records_routing = false, keeps_logits = false;
  torch::Tensor forced;  // of the RouterRecord, int32 [L,T,n]; undefined: none
};
std::vector<int64_t> encode_pass(const EncodedPass& pass);
// Throws std::runtime_error when the sizes do not fit each other.
EncodedPass decode_pass(const std::vector<int64_t>& words, torch::Device device);

// The CRC-32 of zlib and zip files.
uint32_t crc32(const void* data, size_t bytes);

}  // namespace mixtral
