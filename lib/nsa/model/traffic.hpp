#pragma once
// What a step moves, from the shapes alone: bytes between memory and processor, and bytes between ranks.

#include <cstdint>
#include <string>
#include <vector>

#include "nsa/model/partition.hpp"

namespace nsa {

/// One exchange of a decode step or of a prefill layer.
struct Exchange {
  std::string name;        ///< "lse", "candidates", "partials", "outputs"; prefill: "raw halo", "k_cmp", ...
  std::string collective;  ///< "all_gather", "all_reduce"
  std::int32_t ranks = 1;
  std::int64_t bytes = 0;  ///< contributed by each rank
};
/// Those of one layer; empty on one rank. `one_launch`: of a sharded decode step in one launch, which leaves o cut by
/// heads, so that y is summed over the kv ranks too.
std::vector<Exchange> exchanges(const Config& config, const Partition& partition, const Point& point,
                                bool one_launch = false);

/// Bytes that must move between memory and this rank's processor, by stage, with every element read once: in the last
/// step of a decode that keeps all query tokens, or in the whole prefill. comm: bytes received from peers. Query tokens
/// of a sequence are taken to have their forced blocks in common, and no others.
std::vector<std::int64_t> modelled_bytes(const Config& config, const Partition& partition, const Point& point);

/// FLOPs of an average rank in the last decode step or a whole prefill, all layers. A multiply-add counts two, and a
/// score that ranks a block two; none where selections are given.
double modelled_flops(const Config& config, const Partition& partition, const Point& point);

}  // namespace nsa
