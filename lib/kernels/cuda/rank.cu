// rank: importance of the selection blocks a rank holds, and the best n; select: the best n of all ranks' candidates.
//
// A cluster of up to 8 CTAs a (row, group), one where rows are many or the GPU has no clusters. The raw scores are read
// once, 4 bytes a head and compressed token, where the tokens of this rank's blocks lie column by column (it holds all,
// or chunks with the tokens in front of them); else once per overlapping block (1.25 times at the paper's geometry).
// They come from the L2 where attend_cmp left them. Each CTA scores a slice of the blocks. Small slices: every CTA
// counts, key by key, how many are better, and puts its best n into the first one's shared memory, which counts once
// more among those. Large ones: all keys go to the first CTA's shared memory (scratch where they do not fit), where a
// radix selection of 4 passes finds the n-th largest and one ordered sweep collects. Bound: latency in decode,
// exponentials (one a head and overlapping token) in prefill.

#include <algorithm>

#include "kernels/cuda/rank_blocks.cuh"
#include "kernels/cuda/stages.cuh"

namespace nsa::gpu {

namespace {

constexpr int most_threads = 512;
constexpr int most_cluster = 8;
// Keys of a slice of which a CTA finds the best n itself: all compared with all, once thinned out. Where lists are few
// that is faster than one CTA's sorting the keys of all slices.
constexpr int most_counted(int n, int cluster) { return n <= 16 && cluster > 1 ? 4096 : 512; }

struct Threshold {
  unsigned key;        // the n-th largest
  std::int64_t above;  // blocks with a larger key
};

// The n-th largest of `blocks` keys, 8 bits a pass.
__device__ Threshold nth_largest(std::int64_t blocks, std::int64_t n, unsigned* histogram, const unsigned* keys) {
  __shared__ unsigned chosen;
  __shared__ unsigned above;
  unsigned prefix = 0, mask = 0;
  std::int64_t wanted = n;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int b = threadIdx.x; b < 256; b += blockDim.x) histogram[b] = 0;
    __syncthreads();
    for (std::int64_t u = threadIdx.x; u < blocks; u += blockDim.x) {
      const unsigned k = keys[u];
      if ((k & mask) == prefix) atomicAdd(&histogram[k >> shift & 255u], 1u);
    }
    __syncthreads();
    if (threadIdx.x < 32) {  // lane l holds digits 255-8l .. 248-8l, largest first
      unsigned counts[8], sum = 0;
      for (int d = 0; d < 8; ++d) sum += counts[d] = histogram[255 - threadIdx.x * 8 - d];
      unsigned upto = sum;
      for (int step = 1; step < 32; step *= 2) {
        const unsigned other = __shfl_up_sync(0xffffffffu, upto, step);
        if (static_cast<int>(threadIdx.x) >= step) upto += other;
      }
      unsigned before = upto - sum;
      if (before < wanted && upto >= wanted)
        for (int d = 0; d < 8; ++d) {
          if (before + counts[d] >= wanted) {
            chosen = 255 - threadIdx.x * 8 - d;
            above = before;
            break;
          }
          before += counts[d];
        }
    }
    __syncthreads();
    prefix |= chosen << shift;
    mask |= 255u << shift;
    wanted -= above;
    __syncthreads();
  }
  return {prefix, n - wanted};
}

// The blocks above the threshold and the first of those at it, by rising index.
__device__ void collect(std::int64_t blocks, std::int64_t n, Threshold threshold, const unsigned* keys, int* chosen) {
  __shared__ int above_of[32], equal_of[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const std::int64_t equal_wanted = n - threshold.above;
  std::int64_t equal_seen = 0, taken = 0;
  for (std::int64_t u0 = 0; u0 < blocks && taken < n; u0 += blockDim.x) {
    const std::int64_t u = u0 + threadIdx.x;
    const unsigned k = u < blocks ? keys[u] : 0;
    const bool above = u < blocks && k > threshold.key, equal = u < blocks && k == threshold.key;
    const unsigned above_mask = __ballot_sync(0xffffffffu, above), equal_mask = __ballot_sync(0xffffffffu, equal);
    if (lane == 0) {
      above_of[warp] = __popc(above_mask);
      equal_of[warp] = __popc(equal_mask);
    }
    __syncthreads();
    std::int64_t above_before = 0, equal_before = equal_seen, above_all = 0, equal_all = 0;
    for (int w = 0; w < warps; ++w) {
      if (w < warp) above_before += above_of[w], equal_before += equal_of[w];
      above_all += above_of[w], equal_all += equal_of[w];
    }
    const unsigned below = (1u << lane) - 1;
    above_before += __popc(above_mask & below);
    equal_before += __popc(equal_mask & below);
    const std::int64_t equal_kept = (equal_before < equal_wanted ? equal_before : equal_wanted) -
                                    (equal_seen < equal_wanted ? equal_seen : equal_wanted);
    if (above || (equal && equal_before < equal_wanted))
      chosen[taken + above_before + equal_kept] = static_cast<int>(u);
    const std::int64_t now = equal_seen + equal_all;
    taken +=
        above_all + (now < equal_wanted ? now : equal_wanted) - (equal_seen < equal_wanted ? equal_seen : equal_wanted);
    equal_seen = now;
    __syncthreads();
  }
}

__device__ bool is_better(Candidate a, Candidate b) {
  return a.score > b.score || (a.score == b.score && a.block < b.block);
}

// Blocks of a CTA's slice; whole chunks where they are cut, because a piece must not begin inside one.
__host__ __device__ std::int64_t slice_blocks(const RankParams& p, std::int64_t blocks) {
  const std::int64_t each = (blocks + p.cluster - 1) / p.cluster;
  return p.per_chunk == INT32_MAX ? each : (each + p.per_chunk - 1) / p.per_chunk * p.per_chunk;
}

// Blocks held and eligible: those of whole chunks, and of the last one if it is this rank's.
__device__ int held_blocks(const RankParams& p, int eligible) {
  const RowMap& m = p.a.token_map;
  if (m.rank == all_ranks || m.kv == 1) return eligible;
  const int chunks = eligible / p.per_chunk, whole = chunks > m.rank ? (chunks - m.rank - 1) / m.kv + 1 : 0;
  return whole * p.per_chunk + (chunks % m.kv == m.rank ? eligible % p.per_chunk : 0);
}

// p_slc where no block is held: zero.
__device__ void clear_scores(const RankParams& p, std::int64_t list, std::int64_t eligible) {
  if (!p.a.p_slc) return;
  const bool all = p.a.token_map.rank == all_ranks || p.a.token_map.kv == 1;
  for (std::int64_t j = threadIdx.x; j < p.a.p_slc_blocks; j += blockDim.x)
    if (j >= eligible || !(all || has_chunk(p.a.token_map, j / p.per_chunk)))
      p.a.p_slc[list * p.a.p_slc_blocks + j] = 0.0f;
}

// In place: of every 32 entries only the best n stay, side by side. Returns how many there are. All threads.
__device__ int thin_out(Entry* entries, int count, int n) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int runs = (count + 31) / 32;
  for (int run0 = 0; run0 < runs; run0 += warps) {
    const int run = run0 + warp, at = run * 32 + lane;
    const Entry mine = warp_sorted(at < count ? entries[at] : 0);
    __syncthreads();
    if (run < runs && lane < n) entries[run * n + lane] = mine;
    __syncthreads();
  }
  return runs * n;
}

// The best n of `count` entries, in order, to `to`. All threads.
__device__ void best_of(const Entry* entries, int count, int n, Entry* to) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const Entry mine = entries[i];
    int better = 0;
#pragma unroll 8
    for (int other = 0; other < count; ++other) better += entries[other] > mine;
    if (mine != 0 && better < n) to[better] = mine;
  }
}

// From the best down as candidates, by rising index as the selection. Entries of none stand at the end.
__device__ void put_out(const RankParams& p, std::int64_t list, const Entry* best) {
  const int n_sel = p.a.shape.rules.n_sel;
  for (int c = threadIdx.x; c < n_sel; c += blockDim.x) {
    const Entry mine = best[c];
    const auto block = mine == 0 ? -1 : static_cast<std::int32_t>(block_at(p, block_of(mine)));
    if (p.a.candidates)
      p.a.candidates[list * n_sel + c] =
          block < 0 ? Candidate{} : Candidate{__uint_as_float(static_cast<unsigned>(mine >> 32)), block};
    if (!p.a.selected) continue;
    int place = c;
    if (block >= 0) {
      place = 0;
      for (int other = 0; other < n_sel; ++other) place += best[other] != 0 && block_of(best[other]) < block_of(mine);
    }
    p.a.selected[list * n_sel + place] = block;
  }
}

// Small slices: the best n of each, then the best n of those in the first CTA.
__device__ void choose_counted(const RankParams& p, const RankShared& at, int slice, int size) {
  const int n = p.a.shape.rules.n_sel;
  Entry* mine = in_cta(at.gathered, 0) + slice * n;
  for (int c = size + threadIdx.x; c < n; c += blockDim.x) mine[c] = 0;
  Entry* entries = static_cast<Entry*>(at.keys);
  int count = n <= 16 && size > 64 ? thin_out(entries, size, n) : size;
  while (n <= 16 && count > 256) count = thin_out(entries, count, n);
  best_of(entries, count, n, mine);
  if (p.cluster > 1)
    cluster_barrier();
  else
    __syncthreads();
  if (slice != 0) return;
  for (int c = threadIdx.x; c < n; c += blockDim.x) at.best[c] = 0;
  __syncthreads();
  best_of(at.gathered, p.cluster * n, n, at.best);
}

// Large slices: all keys in one place, the n-th largest by radix.
__device__ void choose_sorted(const RankParams& p, const RankShared& at, const unsigned* keys, int slice,
                              std::int64_t blocks) {
  const int n = p.a.shape.rules.n_sel;
  if (p.cluster > 1) {
    if (p.in_scratch) __threadfence();
    cluster_barrier();
  }
  if (slice != 0) return;
  const int found = static_cast<int>(blocks < n ? blocks : n);
  if (blocks > n) {
    collect(blocks, n, nth_largest(blocks, n, at.histogram, keys), keys, at.chosen);
  } else {
    for (int c = threadIdx.x; c < found; c += blockDim.x) at.chosen[c] = c;
  }
  __syncthreads();
  for (int c = threadIdx.x; c < n; c += blockDim.x) {
    if (c < found) at.gathered[c] = entry_of(keys[at.chosen[c]], at.chosen[c]);
    at.best[c] = 0;
  }
  __syncthreads();
  best_of(at.gathered, found, n, at.best);
}

// Two CTAs an SM: where there is but one, the next launch's are already there when it ends.
__global__ void __launch_bounds__(most_threads, 2) rank_kernel(const __grid_constant__ RankParams p) {
  extern __shared__ float2 shared[];
  const LayerShape& s = p.a.shape;
  const RankShared at(p, shared);
  const int slice = blockIdx.x % p.cluster;
  const std::int64_t list = blockIdx.x / p.cluster, row = list / s.groups, g = list % s.groups;
  wait_for_previous();
  const std::int64_t t = tile_row(p.a.tile, row).t;
  load_normalisers(p, row, g, at.normaliser);  // while the position is under way
  const std::int64_t eligible = eligible_blocks(s.rules, t);
  const int blocks = held_blocks(p, static_cast<int>(eligible));
  if (eligible <= s.rules.n_sel && p.a.selected && !p.a.candidates && !p.a.p_slc) {  // all of them
    if (slice == 0)
      for (int c = threadIdx.x; c < s.rules.n_sel; c += blockDim.x)
        p.a.selected[list * s.rules.n_sel + c] = c < eligible ? c : -1;
    return;
  }
  // The first CTA must have started before others write to its memory: they say so here and ask below.
  if (p.cluster > 1) cluster_arrive();
  if (slice == 0) clear_scores(p, list, eligible);
  __syncthreads();
  const int each = static_cast<int>(slice_blocks(p, blocks)), begin = min(each * slice, blocks),
            end = min(begin + each, blocks);
  if (p.counted) {
    Entry* entries = static_cast<Entry*>(at.keys);
    score_blocks(p, row, g, t, begin, end, at, [&](int u, unsigned key) { entries[u - begin] = entry_of(key, u); });
    if (p.cluster > 1) cluster_wait();
    choose_counted(p, at, slice, end - begin);
  } else {
    unsigned* keys =
        p.in_scratch ? static_cast<unsigned*>(p.a.scratch) + list * p.most_blocks : static_cast<unsigned*>(at.keys);
    if (p.cluster > 1) cluster_wait();
    unsigned* to = p.cluster > 1 && !p.in_scratch ? in_cta(keys, 0) : keys;
    score_blocks(p, row, g, t, begin, end, at, [&](int u, unsigned key) { to[u] = key; });
    choose_sorted(p, at, keys, slice, blocks);
  }
  if (slice != 0) return;
  __syncthreads();
  put_out(p, list, at.best);
}

// RankShared memory: all candidates, and whether each is among the best n.
__global__ void select_kernel(const __grid_constant__ SelectArgs a) {
  extern __shared__ Candidate all[];
  wait_for_previous();
  const int n = a.shape.rules.n_sel, count = a.ranks * n;
  bool* is_chosen = reinterpret_cast<bool*>(all + count);
  __shared__ int found;
  if (threadIdx.x == 0) found = 0;
  const std::int64_t list = blockIdx.x, lists = gridDim.x;
  for (int c = threadIdx.x; c < count; c += blockDim.x) all[c] = a.candidates[(c / n * lists + list) * n + c % n];
  __syncthreads();
  for (int c = threadIdx.x; c < count; c += blockDim.x) {
    int better = 0;
    for (int o = 0; o < count; ++o) better += all[o].block >= 0 && is_better(all[o], all[c]);
    is_chosen[c] = all[c].block >= 0 && better < n;
    if (is_chosen[c]) atomicAdd(&found, 1);
  }
  __syncthreads();
  std::int32_t* to = a.selected + list * n;
  for (int c = threadIdx.x; c < count; c += blockDim.x) {
    if (!is_chosen[c]) continue;
    int place = 0;
    for (int o = 0; o < count; ++o) place += is_chosen[o] && all[o].block < all[c].block;
    to[place] = all[c].block;
  }
  for (int c = found + threadIdx.x; c < n; c += blockDim.x) to[c] = -1;
}

RankRun run_of(const RankArgs& a) {
  const BlockRules& r = a.shape.rules;
  const RowMap &cmp = a.cmp_map, &token = a.token_map;
  const int lead = (r.l - 1) / r.d;
  if (cmp.chunk == INT64_MAX && token.chunk == INT64_MAX) return {true, 0, -lead, (lead + 3) / 4 * 4};
  const bool own = cmp.rank != all_ranks && cmp.rank == token.rank && cmp.kv == token.kv && cmp.before == lead &&
                   cmp.chunk * r.d == token.chunk;
  if (!own) return {false, 0, 0, lead};
  const auto stride = static_cast<int>(score_stride(cmp));
  return {true, stride, static_cast<int>(score_front(cmp)) - lead, stride - static_cast<int>(cmp.chunk)};
}

}  // namespace

std::size_t rank_scratch(const LayerShape& s, const QueryTile& tile) {
  const std::int64_t blocks = tile.max_positions / s.rules.l_sel + 1;
  const std::size_t most_fixed =
      48 << 10;  // of RankShared::bytes besides the keys; more than that and scratch is there too
  return blocks * sizeof(unsigned) + most_fixed <= limits().shared_bytes
             ? 0
             : static_cast<std::size_t>(tile.rows() * s.groups * blocks) * sizeof(unsigned);
}

void rank(const RankArgs& a, Stream* stream) {
  const std::int64_t lists = a.tile.rows() * a.shape.groups;
  if (lists == 0) return;
  const BlockRules& r = a.shape.rules;
  RankParams p{a, 0, 0, INT32_MAX, 0, 0, 0, 0, false, 1, false, {}};
  p.pitch = score_pitch(a.cmp_map, compressed_tokens(r, a.tile.max_positions - 1));
  const std::int64_t blocks = (a.tile.max_positions - 1) / r.l_sel + 1;
  const bool cut = a.token_map.chunk != INT64_MAX;
  if (cut) p.per_chunk = static_cast<int>(a.token_map.chunk / r.l_sel);
  p.most_blocks = a.token_map.rank == all_ranks || a.token_map.kv == 1
                      ? blocks
                      : owned_chunks(a.token_map, blocks * r.l_sel, a.token_map.rank) * p.per_chunk;
  // A slice of a few blocks is not worth a CTA.
  if (limits().capability >= 90)
    while (p.cluster < most_cluster && (p.cluster == 1 ? lists : 2 * lists * p.cluster) <= limits().units &&
           blocks > p.cluster * 16)
      p.cluster *= 2;
  const std::int64_t slice = std::max<std::int64_t>(1, slice_blocks(p, p.most_blocks));
  const int threads = lists * p.cluster > 2 * limits().units ? 256 : most_threads;
  const int ratio = r.l_sel / r.d;
  p.run = run_of(a);
  const int between = p.run.between;
  // A run's columns by four: two of them a thread.
  p.terms = p.run.present ? std::max(8 * threads, ratio + between) : std::max(2 * threads, ratio) + between;
  p.piece = static_cast<int>(std::min<std::int64_t>({p.per_chunk, slice, (p.terms - between) / ratio}));
  if (cut && p.piece < p.per_chunk)  // pieces must divide a chunk
    while (p.per_chunk % p.piece != 0) --p.piece;
  p.together = std::max(1, p.terms / (p.piece * ratio + between));
  p.counted = slice <= most_counted(r.n_sel, p.cluster);
  p.key_words = static_cast<int>(p.counted ? slice : (p.most_blocks + 1) / 2);
  p.in_scratch = RankShared::bytes(p) > limits().shared_bytes - 1024;
  if (p.in_scratch) {
    p.key_words = 0;
    if (a.scratch_bytes < lists * p.most_blocks * sizeof(unsigned)) throw InternalError("rank: scratch too small");
  }
  launch_early(rank_kernel, dim3(static_cast<unsigned>(lists * p.cluster)), threads, RankShared::bytes(p), stream,
               p.cluster, p);
}

void select(const SelectArgs& a, Stream* stream) {
  const std::int64_t lists = a.tile.rows() * a.shape.groups;
  if (lists == 0) return;
  const std::size_t shared = a.ranks * a.shape.rules.n_sel * (sizeof(Candidate) + 1);
  launch_early(select_kernel, dim3(static_cast<unsigned>(lists)), 128, shared, stream, 1, a);
}

}  // namespace nsa::gpu
