#pragma once
// Arguments of a fused decode step on one of the ranks that share its sequences (decode/sharded/kernel.cuh).

#include "kernels/cuda/decode/fused/params.cuh"
#include "kernels/cuda/exchange/peer_exchange.hpp"

namespace nsa::gpu {

struct ShardCoord;

struct ShardedDecodeParams : FusedDecodeParams {
  using Coord = ShardCoord;
  static constexpr bool is_shard = true, is_layer = true;
  static constexpr int max_kv = 8;
  int kv = 1, rank = 0;
  bool exchanges = true;  ///< false: sends nothing and waits for nobody, to try the launch alone
  PeerGroup peers;
  int chunk_blocks = 1;              ///< selection blocks of a chunk
  Divisor by_chunk_blocks, by_kv;    ///< by chunk_blocks, kv
  HeadRange finished;                ///< heads that this rank finishes
  Divisor by_heads;                  ///< by the heads of a row
  int slots = 0, slot_bytes = 0;     ///< of a parity (decode/sharded/exchange.cuh)
  std::int64_t* readings = nullptr;  ///< [work items][step_readings], or null
  AppendedRows appended;             ///< without memory: none is appended
  StepLog log;
  int merge_lanes = 1;  ///< a power of two, not below the CTAs of a work item on all ranks
  __device__ __forceinline__ int held_buckets() const { return by_kv(shape.lse.buckets); }
};

// The kernels of one storage type.
/// active_clusters() of decode/fused/params.cuh.
template <DType Storage>
int active_sharded_clusters(const LayerShape& s, int cluster);
/// Work items that are resident at the same time, with the division that `p` has.
template <DType Storage>
int resident_sharded_items(const ShardedDecodeParams& p);
template <DType Storage>
void launch_sharded_decode(const ShardedDecodeParams& p, Stream* stream);

}  // namespace nsa::gpu
