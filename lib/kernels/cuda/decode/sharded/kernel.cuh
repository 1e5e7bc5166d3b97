#pragma once
// Fused decode attention on one of the ranks that share the sequences: the fused decode step (decode/fused/kernel.cuh)
// over this rank's chunks, with exchanges between its phases (decode/sharded/exchange.cuh): LSE buckets, after which
// every rank has the normalisers of cmp; the best 16 blocks of each rank; the (m, sum) of every CTA, on their way while
// the CTAs add the o of their warps; one vector a head, to the rank that finishes it. So the blocks are chosen by the
// same bits as on one rank.
//
// Where it does what is around the attention too (ShardedStepArgs::ends), it first appends: every CTA of a work item
// writes the new rows that the rank holds, and the CTA that attends the compressed token which completes, or has it as
// a halo row, forms it. The last CTA to read the position moves it on.
//
// All work items are resident at the same time, so that no cluster waits for one that cannot start.
//
// Bytes: those of the fused step over 1 / kv of the K and V; over the link a work item and peer 2 * (8 * heads *
// buckets / kv + 128 + 24 * heads * CTAs + 4 * heads * Dv / kv). Bound: as the fused step, and three times the way to a
// peer, some 1.2 us each.

#include "kernels/cuda/decode/fused/launch.cuh"
#include "kernels/cuda/decode/sharded/exchange.cuh"

namespace nsa::gpu {

/// Merges the branches and ranks. The (m, sum) of all CTAs have come in meanwhile, so this rank's partials become one
/// vector, normalised over all ranks and gated. The rank that finishes a head adds those of all ranks by rising rank.
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
    weigh_states();
    at.end_phase(StepPhase::wait_states);
    __syncthreads();
    send_values();
    at.end_phase(StepPhase::merge_branches);
    add_values();
    at.end_phase(StepPhase::wait_values);
  }

 private:
  // Replaces m of the cluster's partials by the factor of their o: gate * 2^(m - M) / L. Neighbouring lanes have the
  // CTAs of all ranks.
  __device__ __forceinline__ void weigh_states() const {
    const int lanes = p.merge_lanes, first_head = first / quads, heads = (first + count - 1) / quads - first_head + 1,
              groups = count > 0 ? branches * heads : 0, cta_of_ranks = threadIdx.x % lanes,
              rank = p.by_cluster(cta_of_ranks), cta = cta_of_ranks - rank * p.cluster;
#pragma unroll 1
    for (int g0 = 0; g0 < groups; g0 += threads / lanes) {
      const int g = g0 + static_cast<int>(threadIdx.x) / lanes,
                b = g < heads       ? 0
                    : g < 2 * heads ? 1
                                    : 2,
                head = g - b * heads;
      const bool own = g < groups && rank == p.rank;
      float2* state = cluster.partials_ms() + (b * p.cluster + cta) * p.o_slice_heads + head;
      SoftmaxState<Exp2> x;
      if (g < groups && rank < p.kv && !p.leave_out[b]) {
        const float2 ms = own ? *state : at.receive_state(cta_of_ranks, b, first_head + head);
        x = {ms.x, ms.y};
      }
      __syncwarp();
      float m = x.m;
      for (int step = lanes / 2; step > 0; step /= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, step));
      const float scale = exp2_fast(x.m - m);
      float sum = scale * x.s;
      for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (own) state->x = cluster.gates()[b] * scale * inverse_or_zero(sum);
    }
  }
  // Calls use(index in the slice) with the threads of an item: four where there are enough, which all have the result
  // of value_of(). The last of a warp's items may not exist.
  __device__ __forceinline__ int lanes_of_item() const { return p.o_slice * 4 <= threads ? 4 : 1; }
  __device__ __forceinline__ float4 value_of(int i, int lanes) const {
    const int lane = threadIdx.x % lanes, head = (first + i) / quads - first / quads;
    const float4* o = cluster.partials_o() + i;
    const float2* weights = cluster.partials_ms() + head;
    float4 value = {};
#pragma unroll 4
    for (int k = lane; k < branches * p.cluster; k += lanes)
      add_scaled(value, weights[k * p.o_slice_heads].x, o[k * p.o_slice]);
    for (int step = lanes / 2; step > 0; step /= 2) {
      value.x += __shfl_xor_sync(0xffffffffu, value.x, step), value.y += __shfl_xor_sync(0xffffffffu, value.y, step);
      value.z += __shfl_xor_sync(0xffffffffu, value.z, step), value.w += __shfl_xor_sync(0xffffffffu, value.w, step);
    }
    return value;
  }
  __device__ __forceinline__ void send_values() const {
    const int lanes = lanes_of_item();
#pragma unroll 1
    for (int i0 = 0; i0 < count; i0 += threads / lanes) {
      const int i = i0 + static_cast<int>(threadIdx.x) / lanes;
      const float4 value = value_of(min(i, count - 1), lanes);
      __syncwarp();
      if (i >= count || threadIdx.x % lanes != 0) continue;
      const int to = at.finisher((first + i) / quads);
      if (to == p.rank)
        cluster.partials_o()[i] = value;  // for add_values(), in the place of a partial that this thread alone has read
      else
        at.send_value(to, first + i, value);
    }
  }
  __device__ __forceinline__ void add_values() const {
    const int lanes = lanes_of_item();
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x) / lanes; i < count; i += threads / lanes) {
      if (threadIdx.x % lanes != 0 || at.finisher((first + i) / quads) != p.rank) continue;
      float4 sum = {};
#pragma unroll 1
      for (int rank = 0; rank < p.kv; ++rank)
        add_scaled(sum, 1.0f, rank == p.rank ? cluster.partials_o()[i] : at.receive_value(rank, first + i));
      const int head = at.group * p.shape.heads_per_group - p.finished.first;  // first of the item, among the finished
      cluster.store_quad((std::int64_t{at.row} * p.finished.count + head) * quads + first + i, sum);
    }
  }
};

template <class WarpTile, int W>
__global__ void __launch_bounds__(32 * W, fused_warps / W)
    sharded_decode_kernel(const __grid_constant__ ShardedDecodeParams p) {
  extern __shared__ __align__(128) char shared[];
  FusedDecode<WarpTile, W, true, ShardedDecodeParams> step(p, shared);
  griddep_wait();
  step.start();
  step.at.read_clock(0);
  const auto merge = attend_and_send(step);
  step.at.end_phase(StepPhase::merge_warps);
  if (W == fused_warps && p.cluster > 1)
    cluster_barrier();
  else
    __syncthreads();
  step.at.end_phase(StepPhase::cluster_merge);
  ShardedMerge<WarpTile, W>{merge}.finish();
  if (step.at.warp_in_cluster == 0 && !p.leave_out[sel]) step.store_selected();
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
