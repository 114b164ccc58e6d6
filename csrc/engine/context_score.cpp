#include "context_score.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "../model/transformer.h"
#include "cached_sequence.h"
#include "require.h"
#include "score.h"
#include "window_score.h"

namespace mixtral {
namespace {

constexpr int64_t kKeyBlock = 64;  // of attention (docs/numerics.md)

// A forward pass over inputs [begin, end) of BOS and the text, which scores the tokens [first, end) of the text: input
// i predicts token i.
struct Window {
  int64_t begin, first, end;
};

std::vector<Window> windows_of(int64_t tokens, int64_t context, const Protocol& protocol, int64_t first,
                               int64_t limit) {
  if (protocol.kind == Protocol::kFixed) {
    return {{std::max({int64_t{0}, first + 1 - context, tokens - limit}), first, tokens}};
  }
  const int64_t stride = protocol.kind == Protocol::kSliding ? protocol.stride : context;
  std::vector<Window> windows;
  for (int64_t begin = 0, end = std::min(context, tokens); begin < tokens;
       begin = end, end = std::min(end + stride, tokens)) {
    if (end > first) windows.push_back({std::max<int64_t>(0, end - context), std::max(begin, first), end});
  }
  return windows;
}

// Attention adds up key blocks, which begin at multiples of 64 tokens behind the window's begin. When all that the
// targets can depend on lies inside the window, a few tokens more change nothing, and the windows of all such contexts
// then have the same key blocks: their results are equal bit for bit.
void align(Window& window, const Config& config) {
  const auto field = receptive_field(config);
  if (field && window.first - window.begin >= *field) window.begin -= window.begin % kKeyBlock;
}

// nll of the targets of one document, in order, and the means of its windows.
struct DocumentScore {
  std::vector<double> nll;
  std::vector<double> window_means;
  int64_t bytes = 0;
};

struct Ratio {
  double value, error;
};

// The sum of `terms` by the sum of `sizes`, and its standard error (linearised, as of a ratio estimator).
Ratio ratio(const std::vector<double>& terms, const std::vector<double>& sizes) {
  const double total = std::accumulate(sizes.begin(), sizes.end(), 0.0);
  const double value = std::accumulate(terms.begin(), terms.end(), 0.0) / total;
  const auto count = static_cast<double>(terms.size());
  if (terms.size() < 2) return {value, 0};
  double squares = 0;
  for (size_t i = 0; i < terms.size(); ++i) squares += std::pow(terms[i] - value * sizes[i], 2);
  return {value, std::sqrt(squares * count / (count - 1)) / total};
}

double sum(const std::vector<double>& values) { return std::accumulate(values.begin(), values.end(), 0.0); }

// Over documents; over the tokens of a single one.
Ratio per_token(const std::vector<std::vector<double>>& nll) {
  if (nll.size() == 1) return ratio(nll[0], std::vector<double>(nll[0].size(), 1));
  std::vector<double> terms, sizes;
  for (const auto& document : nll) {
    terms.push_back(sum(document));
    sizes.push_back(static_cast<double>(document.size()));
  }
  return ratio(terms, sizes);
}

std::vector<std::vector<double>> nll_of(const std::vector<DocumentScore>& documents) {
  std::vector<std::vector<double>> nll;
  for (const DocumentScore& document : documents)
    if (!document.nll.empty()) nll.push_back(document.nll);
  return nll;
}

ContextScore summarize(int64_t context, const std::vector<DocumentScore>& documents) {
  ContextScore score;
  score.context = context;
  const auto nll = nll_of(documents);
  const Ratio mean = per_token(nll);
  score.nll = mean.value;
  score.standard_error = mean.error;
  double total = 0, windows = 0, bytes = 0;
  for (const DocumentScore& document : documents) {
    score.targets += static_cast<int64_t>(document.nll.size());
    total += sum(document.nll);
    bytes += static_cast<double>(document.bytes);
    windows += static_cast<double>(document.window_means.size());
    score.window_mean += sum(document.window_means);
  }
  score.bits_per_byte = total / std::log(2.0) / bytes;
  score.window_mean /= windows;
  return score;
}

void add_change(ContextScore& score, const std::vector<DocumentScore>& now, const std::vector<DocumentScore>& before) {
  auto differences = nll_of(now);
  const auto previous = nll_of(before);
  for (size_t d = 0; d < differences.size(); ++d)
    for (size_t t = 0; t < differences[d].size(); ++t) differences[d][t] -= previous[d][t];
  const Ratio change = per_token(differences);
  score.change = change.value;
  score.change_error = change.error;
}

class Scorer {
 public:
  Scorer(MixtralImpl& model, int64_t bos, std::vector<const Document*> documents, const ContextOptions& options)
      : model_(model),
        bos_(bos),
        documents_(std::move(documents)),
        options_(options),
        limit_(options.ctx_size > 0 ? options.ctx_size : model.config().max_position) {}

  std::vector<ContextScore> by_window(const std::vector<int64_t>& contexts) {
    int64_t longest = 0;
    for (const int64_t context : contexts) {
      for (const Document* document : documents_) {
        for (const Window& window : windows(*document, context)) {
          total_ += window.end - window.begin;
          longest = std::max(longest, window.end - window.begin);
        }
      }
    }
    check_kv_memory(model_, longest, options_.chunk_size, options_.kv_memory);
    std::vector<ContextScore> scores;
    std::vector<DocumentScore> before;
    for (const int64_t context : contexts) {
      std::vector<DocumentScore> now;
      for (const Document* document : documents_) now.push_back(score(*document, context));
      scores.push_back(summarize(context, now));
      if (!before.empty()) add_change(scores.back(), now, before);
      before = std::move(now);
    }
    return scores;
  }

  // The tokens with 1 to contexts[0] inputs before them, then up to contexts[1], and at last all that are left.
  std::vector<ContextScore> by_bucket(std::vector<int64_t> contexts) {
    int64_t longest = 0;
    for (const Document* document : documents_) {
      total_ += static_cast<int64_t>(document->ids.size());
      longest = std::max(longest, std::min(static_cast<int64_t>(document->ids.size()), limit_));
    }
    check_kv_memory(model_, longest, options_.chunk_size, options_.kv_memory);
    if (contexts.back() < longest) contexts.push_back(longest);
    std::vector<std::vector<DocumentScore>> buckets(contexts.size());
    for (const Document* document : documents_) {
      for (auto& bucket : buckets) bucket.emplace_back();
      const int64_t before = done_;
      const auto progress = [&](int64_t done, int64_t) { advance(before + done - done_); };
      const auto logprobs =
          token_logprobs(model_, bos_, document->ids, {limit_, options_.chunk_size, progress, options_.kv_memory});
      const int64_t tokens = static_cast<int64_t>(logprobs.size());
      for (int64_t t = first_target(*document); t < tokens; ++t) {
        const auto bucket = std::lower_bound(contexts.begin(), contexts.end(), t % limit_ + 1) - contexts.begin();
        DocumentScore& score = buckets[static_cast<size_t>(bucket)].back();
        score.nll.push_back(-logprobs[static_cast<size_t>(t)]);
        score.bytes += document->bytes[static_cast<size_t>(t)];
      }
    }
    std::vector<ContextScore> scores;
    for (size_t b = 0; b < buckets.size(); ++b) {
      for (DocumentScore& score : buckets[b])
        if (!score.nll.empty()) score.window_means = {sum(score.nll) / static_cast<double>(score.nll.size())};
      if (!nll_of(buckets[b]).empty()) scores.push_back(summarize(contexts[b], buckets[b]));
    }
    return scores;
  }

 private:
  int64_t first_target(const Document& document) const {
    const auto tokens = static_cast<int64_t>(document.ids.size());
    return options_.targets == 0 ? 0 : std::max<int64_t>(0, tokens - options_.targets);
  }

  std::vector<Window> windows(const Document& document, int64_t context) const {
    auto found = windows_of(static_cast<int64_t>(document.ids.size()), context, options_.protocol,
                            first_target(document), limit_);
    for (Window& window : found) align(window, model_.config());
    return found;
  }

  DocumentScore score(const Document& document, int64_t context) {
    DocumentScore score;
    for (const Window& window : windows(document, context)) {
      std::vector<int64_t> ids{window.begin == 0 ? bos_ : document.ids[static_cast<size_t>(window.begin) - 1]};
      ids.insert(ids.end(), document.ids.begin() + window.begin, document.ids.begin() + window.end);
      const int64_t position = options_.protocol.kind == Protocol::kDisjoint ? 0 : window.begin;
      const auto logprobs = window_logprobs(model_, ids, window.end - window.first, position, options_.chunk_size,
                                            options_.kv_memory, [this](int64_t inputs) { advance(inputs); });
      for (const double logprob : logprobs) score.nll.push_back(-logprob);
      score.window_means.push_back(-sum(logprobs) / static_cast<double>(logprobs.size()));
    }
    score.bytes = std::accumulate(document.bytes.begin() + first_target(document), document.bytes.end(), int64_t{0});
    return score;
  }

  void advance(int64_t inputs) {
    done_ += inputs;
    if (options_.progress) options_.progress(done_, total_);
  }

  MixtralImpl& model_;
  const int64_t bos_;
  const std::vector<const Document*> documents_;
  const ContextOptions& options_;
  const int64_t limit_;
  int64_t done_ = 0, total_ = 0;  // inputs
};

}  // namespace

ContextReport score_contexts(MixtralImpl& model, int64_t bos, const std::vector<Document>& documents,
                             const ContextOptions& options) {
  check_contexts(model.config(), documents, options);
  std::vector<int64_t> contexts = options.contexts;
  std::sort(contexts.begin(), contexts.end());
  contexts.erase(std::unique(contexts.begin(), contexts.end()), contexts.end());

  model.check_ids(&bos, 1);
  std::vector<const Document*> long_enough;
  for (const Document& document : documents) {
    model.check_ids(document.ids.data(), static_cast<int64_t>(document.ids.size()));
    if (static_cast<int64_t>(document.ids.size()) >= contexts.back()) long_enough.push_back(&document);
  }
  ContextReport report;
  report.protocol = options.protocol;
  report.documents = static_cast<int64_t>(long_enough.size());
  report.skipped = static_cast<int64_t>(documents.size()) - report.documents;
  Scorer scorer(model, bos, std::move(long_enough), options);
  report.contexts =
      options.protocol.kind == Protocol::kBuckets ? scorer.by_bucket(contexts) : scorer.by_window(contexts);
  return report;
}

}  // namespace mixtral
