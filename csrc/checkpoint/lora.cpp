#include "lora.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "../io/load_error.h"
#include "../io/nearest.h"
#include "../io/safetensors.h"
#include "../model/ops.h"
#include "weights.h"

namespace mixtral {
namespace {

namespace fs = std::filesystem;

bool remove_prefix(std::string& text, const std::string& prefix) {
  if (text.rfind(prefix, 0) != 0) return false;
  text.erase(0, prefix.size());
  return true;
}

bool remove_suffix(std::string& text, const std::string& suffix) {
  if (text.size() < suffix.size() || text.compare(text.size() - suffix.size(), suffix.size(), suffix) != 0)
    return false;
  text.erase(text.size() - suffix.size());
  return true;
}

// The tensors A and B of one module; empty: not there.
struct Pair {
  std::string a, b;
  bool embedding = false;
};

}  // namespace

// Turns the tensors of one file into changes.
class AdapterReader {
 public:
  AdapterReader(const fs::path& folder, const Config& config, Adapter& adapter)
      : config_(config), lora_(read_lora_config(folder)), file_(open_safetensors(lora_.weights)), adapter_(adapter) {
    for (const WeightNames names :
         {WeightNames::kHuggingFace, WeightNames::kHuggingFaceMerged, WeightNames::kConsolidated}) {
      for (WeightSlice& slice : weight_slices(config, names)) slices_.emplace(slice.tensor, std::move(slice));
    }
  }

  void read() {
    std::map<std::string, Pair> pairs;  // by module
    for (const auto& [tensor, entry] : file_.entries()) {
      std::string name = tensor;
      remove_prefix(name, "base_model.model.");
      if (const size_t at = name.find(".default."); at != std::string::npos) name.erase(at, 8);  // PEFT's adapter name
      const bool embedding = name.find(".lora_embedding_") != std::string::npos;
      const bool is_a = remove_suffix(name, embedding ? ".lora_embedding_A" : ".lora_A.weight");
      if (is_a || remove_suffix(name, embedding ? ".lora_embedding_B" : ".lora_B.weight")) {
        Pair& pair = pairs[name];
        (is_a ? pair.a : pair.b) = tensor;
        pair.embedding = embedding;
      } else {
        replace(tensor, name);
      }
    }
    for (const auto& [module, pair] : pairs) {
      if (pair.a.empty() || pair.b.empty()) {
        const bool no_a = pair.a.empty();
        fail(no_a ? pair.b : pair.a, no_a ? "its lora_A is missing" : "its lora_B is missing");
      }
      add(module, pair);
    }
    if (adapter_.changes_.empty()) throw LoadError(file_.path(), "", "holds no tensor of an adapter");
  }

 private:
  [[noreturn]] void fail(const std::string& tensor, const std::string& reason) const {
    throw LoadError(file_.path(), tensor, reason);
  }

  [[noreturn]] void fail_unknown(const std::string& tensor, const std::string& name) const {
    const bool head = name.rfind("lm_head", 0) == 0 || name.rfind("output", 0) == 0;
    if (head && config_.tie_word_embeddings)
      fail(tensor, "belongs to an lm_head, which is tied to the embeddings here");
    std::vector<std::string> names;
    for (const auto& [known, slice] : slices_) names.push_back(known);
    const std::string near = nearest(name, names);
    fail(tensor, "belongs to no part of this model" + (near.empty() ? "" : "; the nearest is " + near));
  }

  // An adapter of the model without its head has no "model." in front.
  const WeightSlice* find(const std::string& name) const {
    for (const std::string& known : {name, "model." + name}) {
      const auto found = slices_.find(known);
      if (found != slices_.end()) return &found->second;
    }
    return nullptr;
  }

  // In type and shape of the file.
  torch::Tensor values(const std::string& tensor) const {
    const TensorEntry& entry = file_.entries().at(tensor);
    const auto type = float_type(entry.dtype);
    if (!type) fail(tensor, "dtype must be F32, BF16 or F16, got " + entry.dtype);
    const torch::Tensor stored = torch::empty(entry.shape, *type);
    file_.read(entry.begin, stored.data_ptr(), entry.end - entry.begin);
    if (!torch::isfinite(stored).all().item<bool>()) fail(tensor, "must be finite, got inf or NaN");
    return stored;
  }

  void check_shape(const std::string& tensor, const std::vector<int64_t>& shape) const {
    const auto& got = file_.entries().at(tensor).shape;
    if (got != shape) fail(tensor, "shape must be " + shape_string(shape) + ", got " + shape_string(got));
  }

  void check_embeddings(const std::string& tensor, const WeightSlice& slice) const {
    if (config_.tie_word_embeddings && slice.parameter == "embed_tokens")
      fail(tensor, "changes the embeddings, which are the lm_head too: that is not supported");
  }

  void push(const WeightSlice& slice, int64_t first_row, const torch::Tensor& left, const torch::Tensor& right,
            double scale) {
    const auto f32 = [](const torch::Tensor& t) { return t.to(torch::kFloat32).contiguous(); };
    adapter_.changes_[slice.parameter].push_back({slice.first_row + first_row, f32(left), f32(right.t()), scale, {}});
  }

  void replace(const std::string& tensor, std::string name) {
    if (const size_t at = name.find(".base_layer."); at != std::string::npos) name.erase(at, 11);
    const WeightSlice* slice = find(name);
    if (!slice) fail_unknown(tensor, name);
    check_embeddings(tensor, *slice);
    const auto& shape = file_.entries().at(tensor).shape;
    if (slice->rows() == config_.vocab_size && shape.size() == 2 && shape[0] > slice->rows()) {
      fail(tensor, "has " + std::to_string(shape[0]) + " rows for a vocabulary of " + std::to_string(slice->rows()) +
                       ": adapters that add tokens are not supported; save the model after PEFT's merge_and_unload()");
    }
    check_shape(tensor, slice->shape);
    const auto rows = half_split(values(tensor).view({slice->rows(), slice->cols()}), slice->interleaved_head_dim);
    adapter_.changes_[slice->parameter].push_back({slice->first_row, {}, {}, 0, rows});
  }

  void add(std::string module, const Pair& pair) {
    while (remove_suffix(module, ".base_layer")) {  // one wrapper for each parameter of the module, nested
    }
    if (find(module + ".gate_up_proj")) return add_experts(module, pair);
    const WeightSlice* slice = find(module + ".weight");
    if (!slice) fail_unknown(pair.a, module + ".weight");
    check_embeddings(pair.a, *slice);
    const int64_t rank = rank_of(pair.a, 1);
    const double scale = lora_.scale(module, rank);
    if (pair.embedding) {  // [r,vocab] and [H,r]
      check_shape(pair.a, {rank, slice->rows()});
      check_shape(pair.b, {slice->cols(), rank});
      return push(*slice, 0, values(pair.a).t(), values(pair.b).t(), scale);
    }
    check_shape(pair.a, {rank, slice->cols()});
    check_shape(pair.b, {slice->rows(), rank});
    push(*slice, 0, half_split(values(pair.b), slice->interleaved_head_dim), values(pair.a), scale);
  }

  int64_t rank_of(const std::string& a, int64_t experts) const {
    const auto& shape = file_.entries().at(a).shape;
    if (shape.size() != 2 || shape[0] == 0 || shape[0] % experts != 0)
      fail(a, "shape must be [rank, in], the rank of all experts together, got " + shape_string(shape));
    return shape[0] / experts;
  }

  // Which of the two expert parameters it is, and which way round, is told by the shapes alone; but for a matrix with
  // as many rows as columns, which is either way round.
  void add_experts(const std::string& module, const Pair& pair) {
    const int64_t rank = rank_of(pair.a, config_.num_experts);
    const auto& a = file_.entries().at(pair.a).shape;
    const auto& b = file_.entries().at(pair.b).shape;
    const std::vector<int64_t> ends =
        b.size() == 2 && b[1] == a[0] ? std::vector<int64_t>{b[0], a[1]} : std::vector<int64_t>();
    for (const char* name : {".gate_up_proj", ".down_proj"}) {
      const WeightSlice& slice = *find(module + name);
      const int64_t rows = slice.shape[1], cols = slice.shape[2];
      const bool plain = ends == std::vector<int64_t>{rows, cols}, swapped = ends == std::vector<int64_t>{cols, rows};
      if (!plain && !swapped) continue;
      const bool swap = plain && swapped ? lora_.swapped_experts : swapped;
      const double scale = lora_.scale(module + name, rank);
      const auto parts_a = values(pair.a).view({config_.num_experts, rank, -1});
      const auto parts_b = values(pair.b).view({-1, rank, config_.num_experts});
      for (int64_t e = 0; e < config_.num_experts; ++e) {
        const auto part_a = parts_a[e], part_b = parts_b.select(2, e);  // [r,in], [out,r]
        push(slice, e * rows, swap ? part_a.t() : part_b, swap ? part_b.t() : part_a, scale);
      }
      return;
    }
    fail(pair.a,
         "shapes " + shape_string(a) + " and " + shape_string(b) + " of A and B fit no parameter of the experts");
  }

  const Config& config_;
  const LoraConfig lora_;
  const TensorFile file_;
  Adapter& adapter_;
  std::map<std::string, WeightSlice> slices_;  // by tensor, of every spelling
};

Adapter::Adapter(const fs::path& folder, const Config& config) {
  const torch::NoGradGuard no_grad;
  AdapterReader(folder, config, *this).read();
}

void Adapter::merge_into(const torch::Tensor& rows, const std::string& parameter, int64_t first_row,
                         int64_t first_column) const {
  const auto found = changes_.find(parameter);
  if (found == changes_.end()) return;
  for (const Change& change : found->second) {
    const int64_t count = change.whole.defined() ? change.whole.size(0) : change.left.size(0);
    const int64_t begin = std::max(first_row, change.first_row);
    const int64_t end = std::min(first_row + rows.size(0), change.first_row + count);
    if (begin >= end) continue;
    const auto part = rows.narrow(0, begin - first_row, end - begin);
    const auto own = [&](const torch::Tensor& t) { return t.narrow(0, begin - change.first_row, end - begin); };
    if (change.whole.defined()) {
      part.copy_(own(change.whole).narrow(1, first_column, rows.size(1)));
    } else {
      // The order of the sums in grouped_gemm is that of the depths alone; in a product of torch it depends on the
      // sizes.
      const auto right = change.right.narrow(0, first_column, rows.size(1)).unsqueeze(0);
      const auto offs = torch::full({1}, end - begin, torch::kInt32);
      part.add_(ops::grouped_gemm(own(change.left), right, offs), change.scale);
    }
  }
}

}  // namespace mixtral
