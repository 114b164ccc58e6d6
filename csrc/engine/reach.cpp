#include "reach.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <random>

#include "cached_sequence.h"
#include "context_score.h"
#include "require.h"

namespace mixtral {
namespace {

using Ids = std::vector<int64_t>;

torch::Tensor whole(MixtralImpl& model, const Ids& ids) {
  return model.hidden_states(packed_batch({ids}, model.device()));
}

torch::Tensor packed(MixtralImpl& model, const Ids& ids) {
  const Ids before(ids.rbegin(), ids.rbegin() + std::min<int64_t>(7, static_cast<int64_t>(ids.size()))), behind{ids[0]};
  const auto hidden = model.hidden_states(packed_batch({before, ids, behind}, model.device()));
  return hidden.narrow(0, static_cast<int64_t>(before.size()), static_cast<int64_t>(ids.size()));
}

torch::Tensor in_chunks(MixtralImpl& model, const Ids& ids, int64_t chunk_size) {
  return CachedSequence(model, static_cast<int64_t>(ids.size()), chunk_size).feed(ids);
}

torch::Tensor chunked(MixtralImpl& model, const Ids& ids) { return in_chunks(model, ids, 100); }

torch::Tensor rolling(MixtralImpl& model, const Ids& ids) { return in_chunks(model, ids, kPageSize); }

struct Way {
  const char* name;
  torch::Tensor (*run)(MixtralImpl&, const Ids&);  // -> hidden states [T,H]
};

constexpr Way kWays[] = {{"whole", whole}, {"packed", packed}, {"chunked", chunked}, {"rolling", rolling}};

// For each row whether one of its bits differs. NaN differs from itself in value, not in bits.
std::vector<bool> rows_differ(const torch::Tensor& a, const torch::Tensor& b) {
  const auto bits = [](const torch::Tensor& t) {
    return t.to(torch::kCPU).contiguous().view(t.element_size() == 4 ? torch::kInt32 : torch::kInt16);
  };
  const auto differ = bits(a).ne(bits(b)).any(1).contiguous();
  return std::vector<bool>(differ.data_ptr<bool>(), differ.data_ptr<bool>() + differ.size(0));
}

}  // namespace

Reach measure_reach(MixtralImpl& model, const ReachOptions& options) {
  const Config& config = model.config();
  const int64_t limit = options.ctx_size > 0 ? options.ctx_size : config.max_position;
  require(options.trials > 0, "trials must be > 0, got " + std::to_string(options.trials));
  require(limit > 1, "ctx_size must be > 1, got " + std::to_string(limit));
  require(config.vocab_size > 1, "the model must know two tokens, got a vocabulary of 1");
  Reach reach{config.window, config.num_layers, receptive_field(config), {}, {}};
  const int64_t distances = reach.field ? std::min(limit, *reach.field + *reach.field / 4 + 2) : limit;
  const int64_t lead = std::min(config.window, limit - distances);  // most tokens before the replaced one
  const int64_t length = lead + distances;

  std::mt19937_64 random(options.seed);
  const auto draw = [&random](int64_t end) { return static_cast<int64_t>(random() % static_cast<uint64_t>(end)); };
  const int64_t total = 2 * length * options.trials * static_cast<int64_t>(std::size(kWays));
  int64_t done = 0;
  std::vector<int64_t> changed(static_cast<size_t>(distances));
  for (int64_t trial = 0; trial < options.trials; ++trial) {
    Ids ids(static_cast<size_t>(length));
    for (int64_t& id : ids) id = draw(config.vocab_size);
    const int64_t at = draw(lead + 1);
    Ids other = ids;
    int64_t& replaced = other[static_cast<size_t>(at)];
    replaced = (replaced + 1 + draw(config.vocab_size - 1)) % config.vocab_size;
    for (const Way& way : kWays) {
      const auto differ = rows_differ(way.run(model, ids), way.run(model, other));
      int64_t& farthest = reach.farthest.emplace(way.name, 0).first->second;
      for (int64_t d = 0; d < distances; ++d) {
        if (!differ[static_cast<size_t>(at + d)]) continue;
        farthest = std::max(farthest, d);
        if (way.run == whole) ++changed[static_cast<size_t>(d)];
      }
      done += 2 * length;
      if (options.progress) options.progress(done, total);
    }
  }
  for (const int64_t count : changed)
    reach.changed.push_back(static_cast<double>(count) / static_cast<double>(options.trials));
  return reach;
}

nlohmann::json to_json(const Reach& reach) {
  nlohmann::json changed = nlohmann::json::object();
  for (size_t d = 0; d < reach.changed.size(); ++d) changed[std::to_string(d)] = reach.changed[d];
  return {{"window", reach.window},
          {"layers", reach.layers},
          {"reach", reach.field ? nlohmann::json(*reach.field) : nlohmann::json()},
          {"changed", std::move(changed)},
          {"farthest", reach.farthest}};
}

}  // namespace mixtral
