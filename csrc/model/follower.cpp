#include "follower.h"

#include <map>
#include <stdexcept>
#include <string>

#include "rank_message.h"
#include "router_record.h"
#include "sampled_weights.h"
#include "transformer.h"

namespace mixtral {
namespace {

class Follower {
 public:
  explicit Follower(MixtralImpl& model) : model_(model) {}

  void carry_out(const RankMessage& message) {
    switch (message.command) {
      case Command::kForward:
        return forward(decode_pass(message.words, model_.device()));
      case Command::kLogits:
        return logits(message.words.at(0));
      case Command::kMakeCache:
        return make_cache(message.words);
      case Command::kDropCache:
        caches_.erase(message.words.at(0));
        return;
      case Command::kPing:
        return answer(1);
      case Command::kWeightHash:
        return answer(static_cast<int64_t>(sampled_weights(model_)));
      case Command::kStop:
        return;
    }
  }

 private:
  void answer(int64_t number) {
    model_.world()->send(torch::full({1}, number, torch::dtype(torch::kInt64).device(model_.device())), /*to=*/0);
  }

  void forward(EncodedPass pass) {
    RollingKVCache* cache = nullptr;
    if (pass.cache >= 0) {
      cache = &caches_.at(pass.cache);
      cache->zero(pass.zeroed);
    }
    RouterRecord routing(model_.config(), pass.keeps_logits, pass.forced);
    if (pass.records_routing) pass.batch.routing = &routing;
    model_.compute_stage(pass.batch, cache);
  }

  void logits(int64_t rows) {
    const auto hidden =
        torch::empty({rows, model_.config().hidden_size}, torch::dtype(model_.dtype()).device(model_.device()));
    model_.world()->receive(hidden, /*from=*/0);
    model_.compute_logits(hidden);
  }

  void make_cache(const std::vector<int64_t>& words) {
    const RollingKVCache::Options options = {
        words.at(1), words.at(2), words.at(3), model_.device(), static_cast<torch::ScalarType>(words.at(5)),
        words.at(4)};
    caches_.try_emplace(words[0], model_.cache_config(), options);
  }

  MixtralImpl& model_;
  std::map<int64_t, RollingKVCache> caches_;  // by their numbers
};

}  // namespace

void follow(MixtralImpl& model) {
  const auto& world = model.world();
  if (!world || world->rank() == 0) throw std::logic_error("follow: the model must be that of a rank other than 0");
  Follower follower(model);
  try {
    for (int64_t number = 0;; ++number) {
      const RankMessage message = receive_message(*world, number);
      if (message.command == Command::kStop) return;
      follower.carry_out(message);
    }
  } catch (const RankError&) {
    throw;
  } catch (const std::exception& error) {
    const std::string what = error.what();
    world->fail(what.substr(0, what.find('\n')));
    throw;
  }
}

}  // namespace mixtral
