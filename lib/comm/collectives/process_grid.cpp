#include "comm/collectives/process_grid.hpp"

namespace nsa {

std::shared_ptr<const Peers> Layouts::peers(int kv) {
  std::shared_ptr<const Peers>& found = open_[kv];
  if (found) return found;
  const int head_shard = group_.rank() / kv, kv_rank = group_.rank() % kv;
  auto peers = std::make_shared<Peers>();
  peers->heads = Communicator(backend_, group_.split(kv_rank, head_shard));
  peers->kv_control = group_.split(head_shard, kv_rank);
  peers->kv = Communicator(backend_, peers->kv_control);
  return found = std::move(peers);
}

}  // namespace nsa
