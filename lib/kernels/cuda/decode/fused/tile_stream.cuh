#pragma once
// A warp's way through a decode step: its tiles of cmp, then its tiles of either win or sel, 32 tokens at a time out of
// a ring of its own (primitives/cp_async_ring.cuh). Copies run ahead of it from the one into the other as far as is
// known what will be read: all of the window, of sel the blocks that are chosen in any case. So the memory stays busy
// while blocks are scored and chosen.

#include "kernels/cuda/decode/fused/params.cuh"
#include "kernels/cuda/decode/split_kv/warp_tile.cuh"

namespace nsa::gpu {

/// Shared memory of a CTA of W warps. When the rings are empty, the warps' o [warp][cmp, second][heads][d_v + 8] and
/// (m, sum) lie in their place. `parts` is where the list's CTAs send what this one merges: where rank was, because
/// they may send while this one's rings are in use. CTAs of 4 warps are their lists' only ones.
template <class E, int W>
struct StepLayout {
  static constexpr int slot_bytes = DecodeLayout<E>::slot_bytes, slots = DecodeLayout<E>::slots,
                       ring_bytes = DecodeLayout<E>::ring_bytes;
  static constexpr int queries = W * ring_bytes, weights = queries + E::query_bytes,
                       courses = weights + W * E::weight_bytes, gates = courses + W * 2 * 48, meeting = gates + 16,
                       lists = meeting + 16, rank = lists + (W == step_warps ? most_step_cluster * most_chosen * 8 : 0);
  static constexpr int pitch = E::d_v + 8, warp_floats = E::heads * pitch, items = E::heads * (E::d_v / 4);
  static constexpr int sums = W * 2 * warp_floats * 4;          // (m, sum) of the warps
  static constexpr int sums_end = sums + W * 2 * E::heads * 8;  // (m, sum) of the CTA by branch
  static_assert(sums_end + branches * E::heads * 8 <= queries);
  static constexpr int parts = rank, part_bytes = W < step_warps ? 0 : branches * ((items + 8) * 16 + 40 * 8);
  // Of rank: the warps' best, the lanes, the normalisers, overlaps, the warps' tokens.
  static __host__ __device__ int lanes_at() { return rank + W * most_chosen * 8; }
  static __host__ __device__ int normalisers_at(const LayerShape& s) {
    return lanes_at() + s.lse.buckets * E::heads * 8;
  }
  static __host__ __device__ int terms_at(const LayerShape& s) {
    return (normalisers_at(s) + E::heads * 8 + 15) / 16 * 16;
  }
  static __host__ __device__ int overlaps_at(const LayerShape& s) {
    return terms_at(s) + W * (most_lead + scored_tokens) * 4;
  }
  static int bytes(const LayerShape& s) {
    const BlockRules& r = s.rules;
    const int overlaps = r.l_sel / r.d + (r.l - 1) / r.d;
    return std::max(parts + part_bytes, overlaps_at(s) + (overlaps + 4) * 4);  // 4: the compiler loads four at a time
  }
};

/// Tiles first, first + step, ... below count of units of `size` rows that begin at multiples of it; rows in [low,
/// high).
struct Course {
  const char *k, *v;
  int first, step, count;
  int size, tiles_per_unit, unit0, low, high;
};
static_assert(sizeof(Course) == 48);

struct Piece {
  int row, count;
};

template <class E, int W>
struct StepWalk {
  using Layout = StepLayout<E, W>;
  const Course* courses;      // shared, of this warp: cmp, then the second branch
  bool scores_only, chooses;  // chooses: the second branch is sel
  int chosen;                 // of lane u: the u-th block sel attends; -1 none
  unsigned ring;
  std::uint64_t policy;
  // Copies: what comes next is V (`of_values`) or K of tile `ahead` of course `phase`, if that is below `limit`.
  Piece next;
  int phase = 0, ahead, limit, known, in = 0, out = 0, waiting = 0;
  bool of_values = false;

  __device__ __forceinline__ Piece piece(int course, int i) const {
    const Course& c = courses[course];
    const int u = c.tiles_per_unit == 2 ? i / 2 : i / c.tiles_per_unit, at = (i - u * c.tiles_per_unit) * tile_rows;
    int unit = c.unit0 + u;
    if (course == 1 && chooses) unit = __shfl_sync(0xffffffffu, chosen, u);
    const int from = unit * c.size, begin = max(c.low, from), end = min(from + c.size, c.high);
    return {begin + at, min(tile_rows, end - begin - at)};
  }
  // `ahead` or the first tile behind it that has tokens.
  __device__ __forceinline__ void find_next() {
#pragma unroll 1
    while (true) {
      if (ahead < limit) {
        next = piece(phase, ahead);
        if (next.count > 0) return;
        ahead += courses[phase].step;
      } else if (phase == 0) {
        phase = 1, ahead = courses[1].first, limit = known;
      } else {
        return;
      }
    }
  }
  // Queues what comes next, if anything is known, into the slot that has been free for longest. Always one group of
  // copies, so that the latest `slots` groups are those of the slots, or older ones.
  __device__ __forceinline__ void feed() {
    if (ahead < limit) {
      const Course& c = courses[phase];
      const unsigned to = ring + in * Layout::slot_bytes;
      if (E::k_bytes == E::v_bytes)
        cp_async_tile<E::k_bytes>(to, (of_values ? c.v : c.k) + std::int64_t{next.row} * E::k_bytes, next.count,
                                  policy);
      else if (of_values)
        cp_async_tile<E::v_bytes>(to, c.v + std::int64_t{next.row} * E::v_bytes, next.count, policy);
      else
        cp_async_tile<E::k_bytes>(to, c.k + std::int64_t{next.row} * E::k_bytes, next.count, policy);
      in = in + 1 == Layout::slots ? 0 : in + 1;
      ++waiting;
      of_values = !of_values && (phase == 1 || !scores_only);
      if (!of_values) {
        ahead += c.step;
        find_next();
      }
    }
    cp_async_commit();
  }
  // Of the second course, tiles below `known_tiles` are known.
  __device__ __forceinline__ void start(int known_tiles) {
    known = known_tiles;
    ahead = courses[0].first, limit = courses[0].count;
    find_next();
    fill();
  }
  // All is known now. Only between the two courses.
  __device__ __forceinline__ void release() {
    limit = courses[1].count;
    find_next();
    fill();
  }
  __device__ __forceinline__ void fill() {
#pragma unroll 1
    for (int i = Layout::slots - waiting; i > 0; --i) feed();
  }
  // The slot filled longest ago, whole; then it goes back.
  template <class Use>
  __device__ __forceinline__ void take(Use use) {
    cp_async_wait<Layout::slots - 1>();
    use(ring + out * Layout::slot_bytes);
    __syncwarp();
    out = out + 1 == Layout::slots ? 0 : out + 1;
    --waiting;
    feed();
  }
};

}  // namespace nsa::gpu
