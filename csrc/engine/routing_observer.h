// What the routers of one forward pass decide, for traces and counts.
#pragma once

#include <vector>

#include "../model/config.h"
#include "../model/libtorch.h"
#include "../model/router_record.h"
#include "routing_counts.h"
#include "trace.h"

namespace mixtral {

// For one pass: Batch::routing points to it until the pass is done.
class RoutingObserver : public RouterRecord {
 public:
  using RouterRecord::RouterRecord;

  // The recorded experts of a row of the pass, uint8 [L,K] with the row's own K, or null where the router decides.
  struct ForcedRow {
    const uint8_t* experts;
    int64_t top_k;
  };
  // One for each row: see RouterRecord for what becomes of them.
  void force(const std::vector<ForcedRow>& rows);
  // The same for a pass over the tokens [begin, begin + count) of `routing`.
  void force(const Routing& routing, int64_t begin, int64_t count);

  // After the pass: adds `count` of its rows from `begin` on to `routing`, which has their number of experts.
  void append_to(Routing& routing, int64_t begin, int64_t count);
  void count_in(RoutingCounts& counts, int64_t begin, int64_t count);
};

}  // namespace mixtral
