#pragma once
// Fused decode attention on one of the ranks that share the sequences: the fused decode step (decode/fused/kernel.cuh)
// over this rank's chunks, and four exchanges between its phases (decode/sharded/exchange.cuh): LSE buckets, after
// which every rank has the normalisers; the best 16 blocks of each rank; partials of the branches, to the rank that
// finishes a head; o. So the blocks are chosen by the same bits as on one rank.
//
// All work items are resident at the same time, so that no cluster waits for one that cannot start.
//
// Bytes: those of the fused step over 1 / kv of the K and V, and over the link a work item and peer 2 * (8 * 16 *
// buckets / kv + 128 + 4 * branches * heads / kv * (Dv + 2) + 2 * heads / kv * Dv). Bound: as the fused step, and four
// times the way to a peer, some 1.6 us each.

#include "kernels/cuda/decode/fused/kernel.cuh"
#include "kernels/cuda/decode/sharded/exchange.cuh"

namespace nsa::gpu {

/// Merges the partials of the ranks. Each rank finishes some heads of the slice of a CTA.
template <class WarpTile, int W>
struct ShardedMerge {
  using T = typename WarpTile::Type;
  static_assert(sizeof(T) == 2);
  static constexpr int threads = 32 * W, quads = WarpTile::d_v / 4;
  const FusedMerge<WarpTile, W, ShardedDecodeParams>& cluster;
  const ShardedDecodeParams& p = cluster.p;
  const ShardCoord& at = cluster.at;
  const int first = at.cta * p.o_slice, count = min(p.o_slice, at.valid_heads*quads - first);  // items of the slice

  /// Once the partials of the cluster are visible.
  __device__ __forceinline__ void finish() const {
    send_partials();
    merge_ranks();
    receive_o();
  }

 private:
  // Calls use(index in the slice, head, column quad, branch) with four threads an item, the last of which has none. All
  // threads call it as often.
  template <class Use>
  __device__ __forceinline__ void for_each_item(Use use) const {
#pragma unroll 1
    for (int i0 = 0; i0 < count; i0 += threads / 4) {
      const int i = i0 + static_cast<int>(threadIdx.x) / 4, item = first + min(i, count - 1);
      use(i, item / quads, item % quads, static_cast<int>(threadIdx.x) % 4);
    }
  }
  __device__ __forceinline__ void send_partials() const {
    for_each_item([&](int i, int head, int quad, int b) {
      if (i < count && b < branches && !p.leave_out[b] && p.finisher[head] != p.rank)
        at.send_partial(b, head, quad, quads, cluster.merge_ctas(b, first, i));
    });
  }
  // By rising rank.
  __device__ __forceinline__ Partial<Exp2> merge_branch(int i, int head, int quad, int b) const {
    const Partial<Exp2> own = cluster.merge_ctas(b, first, i);
    if (!p.exchanges) return own;
    Partial<Exp2> sum;
#pragma unroll 1
    for (int rank = 0; rank < p.kv; ++rank) {
      const Partial<Exp2> x = rank == p.rank ? own : at.receive_partial(rank, b, head, quad, quads);
      merge_partial(sum.state, sum.o, make_float2(x.state.m, x.state.s), x.o);
    }
    return sum;
  }
  __device__ __forceinline__ void merge_ranks() const {
    for_each_item([&](int i, int head, int quad, int b) {
      const bool finishes = i < count && p.finisher[head] == p.rank;
      float4 value = {};
      if (finishes && b < branches && !p.leave_out[b]) {
        const Partial<Exp2> sum = merge_branch(i, head, quad, b);
        value = sum.o;
        scale_by(value, inverse_or_zero(sum.state.s) * cluster.gates()[b]);
      }
      __syncwarp();
      value = cluster.sum_branches(value);
      if (!finishes || b != 0) return;
      T columns[4];
      store(columns, value.x), store(columns + 1, value.y), store(columns + 2, value.z), store(columns + 3, value.w);
      const uint2 packed = *reinterpret_cast<const uint2*>(columns);
      store_columns(first + i, packed);
      at.send_o(first + i, packed);
    });
  }
  __device__ __forceinline__ void receive_o() const {
#pragma unroll 1
    for (int item = first + static_cast<int>(threadIdx.x); item < first + count; item += threads)
      if (p.finisher[item / quads] != p.rank) store_columns(item, at.receive_o(item));
  }
  __device__ __forceinline__ void store_columns(int item, uint2 packed) const {
    reinterpret_cast<uint2*>(p.o)[std::int64_t{at.first_head} * quads + item] = packed;
  }
};

template <class WarpTile, int W>
__global__ void __launch_bounds__(32 * W, fused_warps / W)
    sharded_decode_kernel(const __grid_constant__ ShardedDecodeParams p) {
  extern __shared__ __align__(128) char shared[];
  FusedDecode<WarpTile, W, true, ShardedDecodeParams> step(p, shared);
  griddep_wait();
  step.start();
  const auto merge = attend_and_send(step);
  if (W == fused_warps && p.cluster > 1)
    cluster_barrier();
  else
    __syncthreads();
  ShardedMerge<WarpTile, W>{merge}.finish();
  if (step.at.cta == 0 && threadIdx.x == 0) step.at.finish();
}

template <class WarpTile>
void launch_sharded_decode_of(const ShardedDecodeParams& p, Stream* stream) {
  const dim3 grid(static_cast<unsigned>(p.tile.rows() * p.shape.groups * p.cluster));
  const auto launch = [&](auto* kernel, int bytes) {
    launch_pdl(kernel, grid, 32 * p.warps, bytes, stream, p.cluster, p);
  };
  if (p.warps == fused_warps)
    launch(sharded_decode_kernel<WarpTile, fused_warps>, FusedSharedLayout<WarpTile, fused_warps>::bytes(p.shape));
  else
    launch(sharded_decode_kernel<WarpTile, fused_warps_small>,
           FusedSharedLayout<WarpTile, fused_warps_small>::bytes(p.shape));
}

/// with_warp_tile() of the head sizes that this kernel is built for.
template <DType Storage, class F>
auto with_sharded_tile(const LayerShape& s, F f) {
  using T = std::conditional_t<Storage == DType::bf16, __nv_bfloat16, __half>;
  if (s.d_k == 64) return f(std::type_identity<WarpTileMma<T, 64, 64>>{});
  return f(std::type_identity<WarpTileMma<T, 128, 128>>{});
}

template <DType Storage>
int active_sharded_clusters(const LayerShape& s, int cluster) {
  return with_sharded_tile<Storage>(s, [&](auto tile) {
    using WarpTile = typename decltype(tile)::type;
    return count_active_clusters<sharded_decode_kernel<WarpTile, fused_warps>, WarpTile, fused_warps>(s, cluster);
  });
}

template <DType Storage>
int resident_sharded_items(const ShardedDecodeParams& p) {
  if (p.warps == fused_warps) return active_sharded_clusters<Storage>(p.shape, p.cluster);
  return with_sharded_tile<Storage>(p.shape, [&](auto tile) {
    using WarpTile = typename decltype(tile)::type;
    constexpr int warps = fused_warps_small;
    return count_active_clusters<sharded_decode_kernel<WarpTile, warps>, WarpTile, warps>(p.shape, 1);
  });
}

template <DType Storage>
void launch_sharded_decode(const ShardedDecodeParams& p, Stream* stream) {
  with_sharded_tile<Storage>(p.shape,
                             [&](auto tile) { launch_sharded_decode_of<typename decltype(tile)::type>(p, stream); });
}

}  // namespace nsa::gpu
