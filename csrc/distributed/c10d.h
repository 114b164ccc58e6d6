// torch's process groups: Gloo over TCP for the CPU, NCCL for GPUs.
//
// Of the groups only send and receive are used: Gloo's all_reduce sums in an order that depends on where an element
// lies in its tensor, so a token's bits would depend on its neighbours.
#pragma once

#include <memory>
#include <string>

#include "store.h"

namespace mixtral {

// backend: "gloo" or "nccl". `address`: of the own host, at which Gloo listens; GLOO_SOCKET_IFNAME, the name of an
// interface, comes before it. Throws RankError when a rank does not come or cannot connect.
std::shared_ptr<Communicator> join_c10d(std::shared_ptr<RankStore> store, const std::string& backend,
                                        const std::string& address, torch::Device device);

}  // namespace mixtral
