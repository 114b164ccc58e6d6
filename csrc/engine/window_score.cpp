#include "window_score.h"

#include <algorithm>

#include "../model/parallel.h"
#include "cached_sequence.h"
#include "sampling.h"

namespace mixtral {

std::vector<double> window_logprobs(MixtralImpl& model, const std::vector<int64_t>& ids, int64_t targets,
                                    int64_t first_position, int64_t chunk_size, int64_t kv_memory,
                                    const std::function<void(int64_t inputs)>& after_chunk) {
  const int64_t inputs = static_cast<int64_t>(ids.size()) - 1, first = inputs - targets;  // the input before a target
  CachedSequence sequence(model, inputs, chunk_size, kv_memory, first_position);
  std::vector<double> logprobs(static_cast<size_t>(targets));
  for (int64_t begin = 0, end = 0; begin < inputs; begin = end) {
    end = std::min(begin + chunk_size, inputs);
    const auto hidden = sequence.feed({ids.begin() + begin, ids.begin() + end});
    if (end > first) {
      const int64_t from = std::max(begin, first);
      const auto logits = model.logits(hidden.narrow(0, from - begin, end - from)).to(torch::kCPU);  // [T,vocab]
      parallel_for(end - from, 1, [&](int64_t row, int64_t last) {
        for (; row < last; ++row) {
          const int64_t t = from + row;
          logprobs[static_cast<size_t>(t - first)] =
              token_logprob(logits.data_ptr<float>() + row * logits.size(1), logits.size(1),
                            ids[static_cast<size_t>(t) + 1], /*top=*/0)
                  .logprob;
        }
      });
    }
    if (after_chunk) after_chunk(end - begin);
  }
  return logprobs;
}

}  // namespace mixtral
