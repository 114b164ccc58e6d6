#include "append_document.h"

#include <array>

#include "require.h"

namespace mixtral {

void append_document(Trace& to, const Trace& from) {
  const auto sizes = [](const Routing& r) { return std::array<int64_t, 3>{r.layers, r.top_k, r.experts}; };
  require(sizes(to.routing) == sizes(from.routing),
          "trace: all documents must have the same layers and experts per token");
  require(to.routing.router_logits.empty() && from.routing.router_logits.empty(),
          "trace: documents with router logits cannot be joined");
  const auto append = [](auto& all, const auto& more) { all.insert(all.end(), more.begin(), more.end()); };
  append(to.token_id, from.token_id);
  append(to.predicted_id, from.predicted_id);
  append(to.position, from.position);
  append(to.routing.topk_ids, from.routing.topk_ids);
  append(to.routing.topk_weights, from.routing.topk_weights);
  to.doc.resize(to.token_id.size(), to.doc.empty() ? 0 : to.doc.back() + 1);
  to.domain.resize(to.token_id.size());
}

}  // namespace mixtral
