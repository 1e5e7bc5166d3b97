#include "comm/collectives/process_grid.hpp"

namespace nsa {

std::shared_ptr<const GridComms> ProcessGrid::comms(int kv) {
  std::shared_ptr<const GridComms>& found = open_[kv];
  if (found) return found;
  const int head_shard = group_.rank() / kv, kv_rank = group_.rank() % kv;
  auto comms = std::make_shared<GridComms>();
  comms->heads = Communicator(backend_, group_.split(kv_rank, head_shard));
  comms->kv_control = group_.split(head_shard, kv_rank);
  comms->kv = Communicator(backend_, comms->kv_control);
  return found = std::move(comms);
}

}  // namespace nsa
