#include "leader.h"

#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "router_record.h"

namespace mixtral {

Leader::Leader(std::shared_ptr<Communicator> world, const Placement& placement)
    : world_(std::move(world)),
      process_(::getpid()),
      stage_size_(placement.tensor_size),
      messages_(static_cast<size_t>(world_->size())) {}

Leader::~Leader() { stop(); }

// An exception leaves the ranks at different places, so none of them can go on.
template <typename Body>
auto Leader::guarded(const Body& body) {
  if (process_ != ::getpid())
    throw std::runtime_error(
        "Mixtral: this process was forked from one whose model has other ranks, which follow that one alone; load the "
        "model here, or start processes with the method \"spawn\"");
  if (failure_) throw RankError(*failure_);
  try {
    return body();
  } catch (const RankError& error) {
    failure_ = error;
  } catch (const std::exception& error) {
    const std::string what = error.what(), reason = what.substr(0, what.find('\n'));
    world_->fail(reason);
    failure_ = RankError(world_->rank(), "failed: " + reason);
  }
  finished_one_.notify_all();
  throw RankError(*failure_);
}

void Leader::tell(int first_rank, int end_rank, const RankMessage& message) {
  std::vector<Communicator::Send> sends;
  for (int rank = first_rank; rank < end_rank; ++rank)
    for (const auto& part : encode_message(message, messages_[static_cast<size_t>(rank)]++, world_->device()))
      sends.push_back({part, rank});
  if (!sends.empty()) world_->exchange(sends, {});
}

// -> the int64 that each of the other ranks answers
std::vector<int64_t> Leader::ask(Command command) {
  tell(1, world_->size(), {command, {}});
  std::vector<Communicator::Receive> answers;
  for (int rank = 1; rank < world_->size(); ++rank)
    answers.push_back({torch::empty({1}, torch::dtype(torch::kInt64).device(world_->device())), rank});
  world_->exchange({}, answers);
  std::vector<int64_t> numbers;
  for (const auto& answer : answers) numbers.push_back(answer.tensor.item<int64_t>());
  return numbers;
}

void Leader::drop_caches() {
  const auto is_gone = [](const KnownCache& cache) { return cache.lifetime.expired(); };
  for (const KnownCache& cache : caches_)
    if (is_gone(cache)) tell(1, world_->size(), {Command::kDropCache, {cache.number}});
  caches_.erase(std::remove_if(caches_.begin(), caches_.end(), is_gone), caches_.end());
}

// A cache that is new is announced.
int64_t Leader::number_of(const RollingKVCache& cache) {
  for (const KnownCache& known : caches_)
    if (known.lifetime.lock() == cache.lifetime()) return known.number;
  const auto& options = cache.options();
  tell(1, world_->size(),
       {Command::kMakeCache,
        {next_cache_, options.page_size, options.num_pages, options.max_chunk, options.padding_tokens,
         static_cast<int64_t>(options.dtype)}});
  caches_.push_back({next_cache_, cache.lifetime()});
  return next_cache_++;
}

Pass Leader::start(const Batch& batch, RollingKVCache* cache) {
  const std::lock_guard lock(mutex_);
  return guarded([&] {
    drop_caches();
    EncodedPass pass;
    pass.batch = batch;
    if (batch.routing) {
      pass.records_routing = true;
      pass.keeps_logits = batch.routing->keeps_logits();
      pass.forced = batch.routing->forced();
    }
    if (cache) {
      pass.cache = number_of(*cache);
      pass.zeroed = cache->take_zeroed();
    }
    RankMessage message{Command::kForward, encode_pass(pass)};
    // The other ranks of the last stage may still be computing another pass with this one: they are told by finish().
    tell(stage_size_, world_->size(), message);
    return Pass{batch, cache, started_++, std::move(message.words)};
  });
}

torch::Tensor Leader::finish(const Pass& pass, const std::function<torch::Tensor()>& compute) {
  std::unique_lock lock(mutex_);
  finished_one_.wait(lock, [&] { return finished_ == pass.number || failure_; });
  const torch::Tensor result = guarded([&] {
    tell(1, stage_size_, {Command::kForward, pass.message});
    return compute();
  });
  ++finished_;
  finished_one_.notify_all();
  return result;
}

torch::Tensor Leader::logits(const torch::Tensor& hidden, const std::function<torch::Tensor()>& compute) {
  const std::lock_guard lock(mutex_);
  return guarded([&] {
    tell(1, stage_size_, {Command::kLogits, {hidden.size(0)}});
    std::vector<Communicator::Send> sends;
    for (int rank = 1; rank < stage_size_; ++rank) sends.push_back({hidden, rank});
    world_->exchange(sends, {});
    return compute();
  });
}

uint64_t Leader::weight_hash(uint64_t own) {
  std::unique_lock lock(mutex_);
  finished_one_.wait(lock, [&] { return started_ == finished_ || failure_; });
  return guarded([&] {
    for (const int64_t part : ask(Command::kWeightHash)) own += static_cast<uint64_t>(part);
    return own;
  });
}

void Leader::ping() {
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock || (started_ != finished_ && !failure_)) return;  // somebody tells the followers more than this
  guarded([&] {
    drop_caches();
    return ask(Command::kPing);  // an answer, or nobody would miss one that is stopped
  });
}

void Leader::stop() noexcept {
  if (process_ != ::getpid()) return;
  const std::lock_guard lock(mutex_);
  if (failure_) return;
  try {
    tell(1, world_->size(), {Command::kStop, {}});
  } catch (const std::exception&) {  // the followers have ended already
  }
  failure_ = RankError(world_->rank(), "was stopped");
}

}  // namespace mixtral
