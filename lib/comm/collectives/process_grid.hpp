#pragma once
// The communicators of a rank in a layout heads x kv. Opening NCCL communicators takes about a second, so they are
// opened once and shared by all points of the layout.

#include <map>
#include <memory>

#include "comm/collectives/communicator.hpp"

namespace nsa {

/// Groups of one rank by default. In a layout, rank r is rank r % kv of head shard r / kv.
struct GridComms {
  Communicator heads;  ///< the ranks with the same kv rank, one of every head shard: their outputs are summed
  Communicator kv;     ///< the ranks of this head shard, which share the KV sequence
  ControlComm kv_control;
};

/// Opens and caches the communicators of each layout of a group.
class ProcessGrid {
 public:
  ProcessGrid(const Backend& backend, const ControlComm& group) : backend_(backend), group_(group) {}
  /// `kv` must divide the size of the group. Collective over the group on the first call for a layout.
  std::shared_ptr<const GridComms> comms(int kv);

 private:
  Backend backend_;
  ControlComm group_;
  std::map<int, std::shared_ptr<const GridComms>> open_;  ///< by kv
};

}  // namespace nsa
