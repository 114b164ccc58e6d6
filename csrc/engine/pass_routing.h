// The routing of one pass: what the routers are forced to, and who gets what they decide.
#pragma once

#include <memory>
#include <vector>

#include "routing_observer.h"
#include "runner.h"

namespace mixtral {

// With the experts that replayed sequences are forced to. None when nothing is counted, and no sequence of the plan is
// traced or replayed.
std::unique_ptr<RoutingObserver> make_observer(const std::vector<Scheduler::Chunk>& plan, const Config& config,
                                               bool counts);
// After the pass, before its tokens count as computed: into the traces of its sequences.
void add_to_traces(RoutingObserver& observer, const std::vector<Scheduler::Chunk>& plan);
// After its tokens are picked: of the tokens of the plan, and of the guesses that held.
void count_routing(RoutingObserver& observer, const std::vector<Scheduler::Chunk>& plan, const std::vector<Step>& steps,
                   RoutingCounts& counts);

}  // namespace mixtral
