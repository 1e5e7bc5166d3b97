// rank: importance of the selection blocks a rank holds, and the best n; select: the best n of all ranks' candidates.
//
// A cluster of up to 8 CTAs a (row, group), one where rows are many or the GPU has no clusters. Where leaves have whole
// tiles and the geometry is the paper's, blocks are scored by tile (rank/from_raw_scores.cuh): from raw scores, read
// once, or from the 10 floats of 32 that the walk of a sharded step leaves a tile and head. Else the raw scores are
// read once, 4 bytes a head and compressed token, where the tokens of this rank's blocks lie column by column (it holds
// all, or chunks with the tokens in front of them); else once per overlapping block (1.25 times at the paper's
// geometry). They come from the L2 where attend_cmp left them. Each CTA scores a slice of the blocks. Small slices:
// every CTA counts, key by key, how many are better, and puts its best n into the first one's shared memory, which
// counts once more among those. Large ones: all keys go to the first CTA's shared memory (scratch where they do not
// fit), where a radix selection of 4 passes finds the n-th largest and one ordered sweep collects. Bound: latency in
// decode, exponentials (one a head and overlapping token) in prefill.

#include <algorithm>

#include "kernels/cuda/attention/kv_tiles.cuh"
#include "kernels/cuda/rank/from_block_sums.cuh"
#include "kernels/cuda/rank/from_raw_scores.cuh"
#include "kernels/cuda/rank/stages.cuh"
#include "kernels/cuda/rank/top_n.cuh"

namespace nsa::gpu {

namespace {

constexpr int most_threads = 512;
constexpr int most_cluster = 8;
// Keys of a slice of which a CTA finds the best n itself: all compared with all, once thinned out. Where lists are few
// that is faster than one CTA's sorting the keys of all slices.
constexpr int most_counted(int n, int cluster) { return n <= 16 && cluster > 1 ? 4096 : 512; }

__device__ bool is_better(Candidate a, Candidate b) {
  return a.score > b.score || (a.score == b.score && a.block < b.block);
}

// Blocks of a CTA's slice; whole chunks where they are cut, because a piece must not begin inside one, or whole tiles.
__host__ __device__ std::int64_t slice_blocks(const RankParams& p, std::int64_t blocks) {
  const std::int64_t each = (blocks + p.cluster - 1) / p.cluster;
  if (p.per_chunk == INT32_MAX && !p.by_tile) return each;
  const std::int64_t whole = p.by_tile ? tile_blocks : p.per_chunk;
  return (each + whole - 1) / whole * whole;
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

// Small slices, of `blocks`: the best n of each, which are among `size` entries, then the best n of those in the first
// CTA.
__device__ void choose_counted(const RankParams& p, const RankShared& at, int slice, int blocks, int size) {
  const int n = p.a.shape.rules.n_sel;
  Entry* mine = in_cta(at.gathered, 0) + slice * n;
  for (int c = blocks + threadIdx.x; c < n; c += blockDim.x) mine[c] = 0;
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

enum class Scored { by_token, by_tile, by_sums };

template <Scored How, class Keep>
__device__ void score_slice(const RankParams& p, std::int64_t row, std::int64_t g, std::int64_t t, int begin, int end,
                            const RankShared& at, Keep keep) {
  if constexpr (How == Scored::by_tile) {
    score_tiles(p, row, g, t, begin, end, at.normaliser, keep);
    __syncthreads();
  } else {
    score_blocks(p, row, g, t, begin, end, at, keep);
  }
}

// Two CTAs an SM: where there is but one, the next launch's are already there when it ends.
template <Scored How>
__global__ void __launch_bounds__(most_threads, 2) rank_kernel(const __grid_constant__ RankParams p) {
  extern __shared__ float2 shared[];
  const LayerShape& s = p.a.shape;
  const RankShared at(p, shared);
  const int slice = blockIdx.x % p.cluster;
  const std::int64_t list = blockIdx.x / p.cluster, row = list / s.groups, g = list % s.groups;
  griddep_wait();
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
  if constexpr (How == Scored::by_sums) {
    const SliceOfSums scorer(p, row, g, t, begin, end, at.normaliser);
    const int lane = threadIdx.x % 32, room = blockDim.x / 32 * most_chosen, size = min(end - begin, room);
    Entry* entries = static_cast<Entry*>(at.keys);
    if (end - begin <= room) {
      scorer.put_entries(entries);
    } else {
      const Entry best = scorer.best();
      if (lane < most_chosen) entries[threadIdx.x / 32 * most_chosen + lane] = best;
    }
    if (p.cluster > 1) cluster_wait();
    __syncthreads();
    choose_counted(p, at, slice, end - begin, size);
  } else if (p.counted) {
    Entry* entries = static_cast<Entry*>(at.keys);
    score_slice<How>(p, row, g, t, begin, end, at, [&](int u, unsigned key) { entries[u - begin] = entry_of(key, u); });
    if (p.cluster > 1) cluster_wait();
    choose_counted(p, at, slice, end - begin, end - begin);
  } else {
    unsigned* keys =
        p.in_scratch ? static_cast<unsigned*>(p.a.scratch) + list * p.most_blocks : static_cast<unsigned*>(at.keys);
    if (p.cluster > 1) cluster_wait();
    unsigned* to = p.cluster > 1 && !p.in_scratch ? in_cta(keys, 0) : keys;
    score_slice<How>(p, row, g, t, begin, end, at, [&](int u, unsigned key) { to[u] = key; });
    choose_sorted(p, at, keys, slice, blocks);
  }
  if (slice != 0) return;
  __syncthreads();
  put_out(p, list, at.best);
}

// Shared memory: all candidates, and whether each is among the best n.
__global__ void select_kernel(const __grid_constant__ SelectArgs a) {
  extern __shared__ Candidate all[];
  griddep_wait();
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
  const bool own = cmp.rank != all_ranks && cmp.rank == token.rank && cmp.kv == token.kv && cmp.halo == lead &&
                   cmp.chunk * r.d == token.chunk;
  if (!own) return {false, 0, 0, lead};
  const auto stride = static_cast<int>(score_stride(cmp));
  return {true, stride, static_cast<int>(score_halo_columns(cmp)) - lead, stride - static_cast<int>(cmp.chunk)};
}

// How many tokens score_blocks() takes at a time.
void plan_rounds(RankParams& p, int threads, std::int64_t slice) {
  const int ratio = p.a.shape.rules.l_sel / p.a.shape.rules.d, between = p.run.between;
  // A run's columns by four: two of them a thread.
  p.terms = p.run.present ? std::max(8 * threads, ratio + between) : std::max(2 * threads, ratio) + between;
  p.piece = static_cast<int>(std::min<std::int64_t>({p.per_chunk, slice, (p.terms - between) / ratio}));
  if (p.per_chunk != INT32_MAX && p.piece < p.per_chunk)  // pieces must divide a chunk
    while (p.per_chunk % p.piece != 0) --p.piece;
  p.together = std::max(1, p.terms / (p.piece * ratio + between));
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
  RankParams p{a, 0, 0, INT32_MAX, 0, 0, 0, 0, false, 1, false, scores_by_tile(a.shape), {}, {}};
  p.pitch = score_pitch(a.cmp_map, compressed_tokens(r, a.tile.max_positions - 1));
  const std::int64_t blocks = (a.tile.max_positions - 1) / r.l_sel + 1;
  const bool cut = a.token_map.chunk != INT64_MAX;
  if (cut) p.per_chunk = static_cast<int>(a.token_map.chunk / r.l_sel);
  p.most_blocks = a.token_map.rank == all_ranks || a.token_map.kv == 1
                      ? blocks
                      : owned_chunks(a.token_map, blocks * r.l_sel, a.token_map.rank) * p.per_chunk;
  // A slice of a few blocks is not worth a CTA.
  if (limits().capability >= 90)
    while (p.cluster < most_cluster && (p.cluster == 1 ? lists : 2 * lists * p.cluster) <= limits().sms &&
           blocks > p.cluster * 16)
      p.cluster *= 2;
  const std::int64_t slice = std::max<std::int64_t>(1, slice_blocks(p, p.most_blocks));
  const int threads = lists * p.cluster > 2 * limits().sms ? 256 : most_threads;
  p.run = run_of(a);
  if (p.by_tile && cut && p.per_chunk % tile_blocks != 0) throw InternalError("rank: a chunk ends within a tile");
  if (a.local_attention && leaves_sums(a.shape))
    p.sums = tile_sums(const_cast<void*>(a.scores), decode_tiles(cmp, a.shape, a.cmp_map, a.tile.max_positions),
                       decode_heads(a.shape.dtype));
  if (!p.by_tile) plan_rounds(p, threads, slice);
  p.counted = p.sums.memory || slice <= most_counted(r.n_sel, p.cluster);
  p.key_words = static_cast<int>(p.sums.memory ? threads / 32 * most_chosen
                                 : p.counted   ? slice
                                               : (p.most_blocks + 1) / 2);
  p.in_scratch = RankShared::bytes(p) > limits().shared_bytes - 1024;
  if (p.in_scratch) {
    p.key_words = 0;
    if (a.scratch_bytes < lists * p.most_blocks * sizeof(unsigned)) throw InternalError("rank: scratch too small");
  }
  launch_pdl(p.sums.memory ? rank_kernel<Scored::by_sums>
             : p.by_tile   ? rank_kernel<Scored::by_tile>
                           : rank_kernel<Scored::by_token>,
             dim3(static_cast<unsigned>(lists * p.cluster)), threads, RankShared::bytes(p), stream, p.cluster, p);
}

void select(const SelectArgs& a, Stream* stream) {
  const std::int64_t lists = a.tile.rows() * a.shape.groups;
  if (lists == 0) return;
  const std::size_t shared = a.ranks * a.shape.rules.n_sel * (sizeof(Candidate) + 1);
  launch_pdl(select_kernel, dim3(static_cast<unsigned>(lists)), 128, shared, stream, 1, a);
}

}  // namespace nsa::gpu
