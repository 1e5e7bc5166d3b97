#pragma once
// Who a rank talks to in a layout heads x kv. Opening NCCL's communicators takes a second or so, so they are opened
// once and serve every point of the layout.

#include <map>
#include <memory>

#include "comm/collectives/communicator.hpp"

namespace nsa {

/// Groups of one by default. In a layout, rank r is rank r % kv of head shard r / kv.
struct GridComms {
  Communicator heads;  ///< whose outputs are summed: the rank of the same place in every head shard
  Communicator kv;     ///< who share the sequences: the ranks of this head shard
  ControlComm kv_control;
};

/// The peers of a group's ranks, by layout, open as long as this lives.
class ProcessGrid {
 public:
  ProcessGrid(const Backend& backend, const ControlComm& group) : backend_(backend), group_(group) {}
  /// `kv` divides the group's size. Collective over the group when a layout is asked for the first time.
  std::shared_ptr<const GridComms> comms(int kv);

 private:
  Backend backend_;
  ControlComm group_;
  std::map<int, std::shared_ptr<const GridComms>> open_;  ///< by kv
};

}  // namespace nsa
