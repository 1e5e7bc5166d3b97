// rank: scores of the selection blocks that a rank holds, and the best n; select: the best n of the candidates of all
// ranks.
//
// Tiling: a cluster of up to 8 CTAs a (row, group), one CTA where rows are many or the GPU has no clusters. Each CTA
// scores a slice of the blocks. Small slices: every CTA selects its best n by counting better entries and stores them
// in the shared memory of CTA 0, which selects among those the same way. Large slices: all keys go to the shared memory
// of CTA 0 (scratch where they do not fit), where a radix selection of 4 passes finds the n-th largest and one ordered
// pass collects.
//
// Bytes: where LSE segments have whole KV tiles and the geometry is that of the paper, blocks are scored by KV tile
// (rank/from_raw_scores.cuh): raw scores once, or the 10 floats instead of 32 that the KV mainloop of a sharded step
// stores a tile and head. Else raw scores, 4 bytes a head and compressed token, once where the columns of this rank's
// blocks are contiguous (it holds all blocks, or chunks with their halos), otherwise once per overlapping block (1.25
// times at the paper's geometry). They come from the L2 where attend_cmp stored them. Bound: latency in decode,
// exponentials (one a head and overlapping token) in prefill.

#include <algorithm>

#include "kernels/cuda/attention/kv_tiles.cuh"
#include "kernels/cuda/rank/from_block_sums.cuh"
#include "kernels/cuda/rank/from_raw_scores.cuh"
#include "kernels/cuda/rank/stages.cuh"
#include "kernels/cuda/rank/top_n.cuh"

namespace nsa::gpu {

namespace {

constexpr int max_threads = 512;
constexpr int rank_max_cluster = 8;
// Blocks of a slice up to which a CTA selects by counting: all entries compared with all, after thin_out(). For few
// work items that is faster than a radix selection over all slices by one CTA.
constexpr int max_counted_blocks(int n, int cluster) { return n <= 16 && cluster > 1 ? 4096 : 512; }

__device__ bool is_better(Candidate a, Candidate b) {
  return a.score > b.score || (a.score == b.score && a.block < b.block);
}

// Blocks of the slice of a CTA: whole chunks where the cache is cut, because a strip must not begin inside one, or
// whole tiles.
__host__ __device__ std::int64_t slice_blocks(const RankParams& p, std::int64_t blocks) {
  const std::int64_t each = (blocks + p.cluster - 1) / p.cluster;
  if (p.per_chunk == INT32_MAX && !p.by_tile) return each;
  const std::int64_t whole = p.by_tile ? tile_blocks : p.per_chunk;
  return (each + whole - 1) / whole * whole;
}

// Eligible blocks held: those of whole chunks, and of the last chunk if this rank has it.
__device__ int held_blocks(const RankParams& p, int eligible) {
  const RowMap& m = p.a.token_map;
  if (m.rank == all_ranks || m.kv == 1) return eligible;
  const int chunks = eligible / p.per_chunk, whole = chunks > m.rank ? (chunks - m.rank - 1) / m.kv + 1 : 0;
  return whole * p.per_chunk + (chunks % m.kv == m.rank ? eligible % p.per_chunk : 0);
}

// Sets p_slc to zero where no block is held.
__device__ void clear_scores(const RankParams& p, std::int64_t work_item, std::int64_t eligible) {
  if (!p.a.p_slc) return;
  const bool all = p.a.token_map.rank == all_ranks || p.a.token_map.kv == 1;
  for (std::int64_t j = threadIdx.x; j < p.a.p_slc_blocks; j += blockDim.x)
    if (j >= eligible || !(all || has_chunk(p.a.token_map, j / p.per_chunk)))
      p.a.p_slc[work_item * p.a.p_slc_blocks + j] = 0.0f;
}

// Stores candidates best first, or the selection by rising index; missing entries are last.
__device__ void store_selection(const RankParams& p, std::int64_t work_item, const Entry* best) {
  const int n_sel = p.a.shape.rules.n_sel;
  for (int c = threadIdx.x; c < n_sel; c += blockDim.x) {
    const Entry own = best[c];
    const auto block = own == 0 ? -1 : static_cast<std::int32_t>(block_at(p, block_of(own)));
    if (p.a.candidates)
      p.a.candidates[work_item * n_sel + c] =
          block < 0 ? Candidate{} : Candidate{__uint_as_float(static_cast<unsigned>(own >> 32)), block};
    if (!p.a.selected) continue;
    int index = c;
    if (block >= 0) {
      index = 0;
      for (int other = 0; other < n_sel; ++other) index += best[other] != 0 && block_of(best[other]) < block_of(own);
    }
    p.a.selected[work_item * n_sel + index] = block;
  }
}

// Small slices: the best n of the `size` entries of each slice of `blocks` blocks, then the best n of those in CTA 0.
__device__ void select_by_count(const RankParams& p, const RankShared& smem, int slice, int blocks, int size) {
  const int n = p.a.shape.rules.n_sel;
  Entry* own = map_to_cta(smem.gathered, 0) + slice * n;
  for (int c = blocks + threadIdx.x; c < n; c += blockDim.x) own[c] = 0;
  Entry* entries = static_cast<Entry*>(smem.keys);
  int count = n <= 16 && size > 64 ? thin_out(entries, size, n) : size;
  while (n <= 16 && count > 256) count = thin_out(entries, count, n);
  best_of(entries, count, n, own);
  if (p.cluster > 1)
    cluster_barrier();
  else
    __syncthreads();
  if (slice != 0) return;
  for (int c = threadIdx.x; c < n; c += blockDim.x) smem.best[c] = 0;
  __syncthreads();
  best_of(smem.gathered, p.cluster * n, n, smem.best);
}

// Large slices: all keys in CTA 0 or scratch, the n-th largest by radix.
__device__ void select_by_radix(const RankParams& p, const RankShared& smem, const unsigned* keys, int slice,
                                std::int64_t blocks) {
  const int n = p.a.shape.rules.n_sel;
  if (p.cluster > 1) {
    if (p.in_scratch) __threadfence();
    cluster_barrier();
  }
  if (slice != 0) return;
  const int found = static_cast<int>(blocks < n ? blocks : n);
  if (blocks > n) {
    collect(blocks, n, nth_largest(blocks, n, smem.histogram, keys), keys, smem.chosen);
  } else {
    for (int c = threadIdx.x; c < found; c += blockDim.x) smem.chosen[c] = c;
  }
  __syncthreads();
  for (int c = threadIdx.x; c < n; c += blockDim.x) {
    if (c < found) smem.gathered[c] = entry_of(keys[smem.chosen[c]], smem.chosen[c]);
    smem.best[c] = 0;
  }
  __syncthreads();
  best_of(smem.gathered, found, n, smem.best);
}

enum class ScoreInput { by_token, by_tile, by_sums };

template <ScoreInput How, class StoreKey>
__device__ void score_slice(const RankParams& p, std::int64_t row, std::int64_t g, std::int64_t t, int begin, int end,
                            const RankShared& smem, StoreKey store_key) {
  if constexpr (How == ScoreInput::by_tile) {
    score_tiles(p, row, g, t, begin, end, smem.normaliser, store_key);
    __syncthreads();
  } else {
    score_blocks(p, row, g, t, begin, end, smem, store_key);
  }
}

// Two CTAs an SM: where there is only one, those of the next launch are resident when it ends.
template <ScoreInput How>
__global__ void __launch_bounds__(max_threads, 2) rank_kernel(const __grid_constant__ RankParams p) {
  extern __shared__ float2 shared[];
  const LayerShape& s = p.a.shape;
  const RankShared smem(p, shared);
  const int slice = blockIdx.x % p.cluster;
  const std::int64_t work_item = blockIdx.x / p.cluster, row = work_item / s.groups, g = work_item % s.groups;
  griddep_wait();
  const std::int64_t t = tile_row(p.a.tile, row).t;
  load_normalisers(p, row, g, smem.normaliser);  // overlaps the load of the position
  const std::int64_t eligible = eligible_blocks(s.rules, t);
  const int blocks = held_blocks(p, static_cast<int>(eligible));
  if (eligible <= s.rules.n_sel && p.a.selected && !p.a.candidates && !p.a.p_slc) {  // every block is selected
    if (slice == 0)
      for (int c = threadIdx.x; c < s.rules.n_sel; c += blockDim.x)
        p.a.selected[work_item * s.rules.n_sel + c] = c < eligible ? c : -1;
    return;
  }
  // CTA 0 must have started before others write to its shared memory: arrive here, wait below.
  if (p.cluster > 1) cluster_arrive();
  if (slice == 0) clear_scores(p, work_item, eligible);
  __syncthreads();
  const int each = static_cast<int>(slice_blocks(p, blocks)), begin = min(each * slice, blocks),
            end = min(begin + each, blocks);
  if constexpr (How == ScoreInput::by_sums) {
    const BlockSumSlice scorer(p, row, g, t, begin, end, smem.normaliser);
    const int lane = threadIdx.x % 32, capacity = blockDim.x / 32 * warp_top_n, size = min(end - begin, capacity);
    Entry* entries = static_cast<Entry*>(smem.keys);
    if (end - begin <= capacity) {
      scorer.store_entries(entries);
    } else {
      const Entry best = scorer.best();
      if (lane < warp_top_n) entries[threadIdx.x / 32 * warp_top_n + lane] = best;
    }
    if (p.cluster > 1) cluster_wait();
    __syncthreads();
    select_by_count(p, smem, slice, end - begin, size);
  } else if (p.counts) {
    Entry* entries = static_cast<Entry*>(smem.keys);
    score_slice<How>(p, row, g, t, begin, end, smem,
                     [&](int u, unsigned key) { entries[u - begin] = entry_of(key, u); });
    if (p.cluster > 1) cluster_wait();
    select_by_count(p, smem, slice, end - begin, end - begin);
  } else {
    unsigned* keys = p.in_scratch ? static_cast<unsigned*>(p.a.scratch) + work_item * p.max_blocks
                                  : static_cast<unsigned*>(smem.keys);
    if (p.cluster > 1) cluster_wait();
    unsigned* to = p.cluster > 1 && !p.in_scratch ? map_to_cta(keys, 0) : keys;
    score_slice<How>(p, row, g, t, begin, end, smem, [&](int u, unsigned key) { to[u] = key; });
    select_by_radix(p, smem, keys, slice, blocks);
  }
  if (slice != 0) return;
  __syncthreads();
  store_selection(p, work_item, smem.best);
}

// Shared memory: all candidates, and whether each is selected.
__global__ void select_kernel(const __grid_constant__ SelectArgs a) {
  extern __shared__ Candidate all[];
  griddep_wait();
  const int n = a.shape.rules.n_sel, count = a.ranks * n;
  bool* is_chosen = reinterpret_cast<bool*>(all + count);
  __shared__ int found;
  if (threadIdx.x == 0) found = 0;
  const std::int64_t work_item = blockIdx.x, work_items = gridDim.x;
  for (int c = threadIdx.x; c < count; c += blockDim.x)
    all[c] = a.candidates[(c / n * work_items + work_item) * n + c % n];
  __syncthreads();
  for (int c = threadIdx.x; c < count; c += blockDim.x) {
    int better = 0;
    for (int o = 0; o < count; ++o) better += all[o].block >= 0 && is_better(all[o], all[c]);
    is_chosen[c] = all[c].block >= 0 && better < n;
    if (is_chosen[c]) atomicAdd(&found, 1);
  }
  __syncthreads();
  std::int32_t* to = a.selected + work_item * n;
  for (int c = threadIdx.x; c < count; c += blockDim.x) {
    if (!is_chosen[c]) continue;
    int index = 0;
    for (int o = 0; o < count; ++o) index += is_chosen[o] && all[o].block < all[c].block;
    to[index] = all[c].block;
  }
  for (int c = found + threadIdx.x; c < n; c += blockDim.x) to[c] = -1;
}

BlockColumns block_columns_of(const RankArgs& a) {
  const BlockRules& r = a.shape.rules;
  const RowMap &cmp = a.cmp_map, &token = a.token_map;
  const int halo = (r.l - 1) / r.d;
  if (cmp.chunk == INT64_MAX && token.chunk == INT64_MAX) return {true, 0, -halo, (halo + 3) / 4 * 4};
  const bool own = cmp.rank != all_ranks && cmp.rank == token.rank && cmp.kv == token.kv && cmp.halo == halo &&
                   cmp.chunk * r.d == token.chunk;
  if (!own) return {false, 0, 0, halo};
  const auto stride = static_cast<int>(score_stride(cmp));
  return {true, stride, static_cast<int>(score_halo_columns(cmp)) - halo, stride - static_cast<int>(cmp.chunk)};
}

// Sizes the rounds of score_blocks().
void plan_rounds(RankParams& p, int threads, std::int64_t slice) {
  const int ratio = p.a.shape.rules.l_sel / p.a.shape.rules.d, gap = p.columns.gap;
  // Contiguous columns are scored by four, two vectors a thread.
  p.terms = p.columns.contiguous ? std::max(8 * threads, ratio + gap) : std::max(2 * threads, ratio) + gap;
  p.strip_blocks = static_cast<int>(std::min<std::int64_t>({p.per_chunk, slice, (p.terms - gap) / ratio}));
  if (p.per_chunk != INT32_MAX && p.strip_blocks < p.per_chunk)  // strips must divide a chunk
    while (p.per_chunk % p.strip_blocks != 0) --p.strip_blocks;
  p.strips_per_round = std::max(1, p.terms / (p.strip_blocks * ratio + gap));
}

}  // namespace

void rank(const RankArgs& a, Stream* stream) {
  const std::int64_t work_items = a.tile.rows() * a.shape.groups;
  if (work_items == 0) return;
  const BlockRules& r = a.shape.rules;
  RankParams p{a, 0, 0, INT32_MAX, 0, 0, 0, 0, false, 1, false, scores_by_tile(a.shape), {}, {}};
  p.pitch = score_pitch(a.cmp_map, compressed_tokens(r, a.tile.max_positions - 1));
  const std::int64_t blocks = (a.tile.max_positions - 1) / r.l_sel + 1;
  const bool cut = a.token_map.chunk != INT64_MAX;
  if (cut) p.per_chunk = static_cast<int>(a.token_map.chunk / r.l_sel);
  p.max_blocks = a.token_map.rank == all_ranks || a.token_map.kv == 1
                     ? blocks
                     : owned_chunks(a.token_map, blocks * r.l_sel, a.token_map.rank) * p.per_chunk;
  // A slice needs enough blocks to be worth a CTA.
  if (limits().capability >= 90)
    while (p.cluster < rank_max_cluster && (p.cluster == 1 ? work_items : 2 * work_items * p.cluster) <= limits().sms &&
           blocks > p.cluster * 16)
      p.cluster *= 2;
  const std::int64_t slice = std::max<std::int64_t>(1, slice_blocks(p, p.max_blocks));
  const int threads = work_items * p.cluster > 2 * limits().sms ? 256 : max_threads;
  p.columns = block_columns_of(a);
  if (p.by_tile && cut && p.per_chunk % tile_blocks != 0) throw InternalError("rank: a chunk ends within a tile");
  if (a.local_attention && leaves_sums(a.shape))
    p.block_sums = tile_sums(const_cast<void*>(a.scores), max_kv_tiles(cmp, a.shape, a.cmp_map, a.tile.max_positions),
                             decode_heads(a.shape.dtype));
  if (!p.by_tile) plan_rounds(p, threads, slice);
  p.counts = p.block_sums.memory || slice <= max_counted_blocks(r.n_sel, p.cluster);
  p.key_words = static_cast<int>(p.block_sums.memory ? threads / 32 * warp_top_n
                                 : p.counts          ? slice
                                                     : (p.max_blocks + 1) / 2);
  p.in_scratch = RankShared::bytes(p) > limits().shared_bytes - 1024;
  if (p.in_scratch) {
    p.key_words = 0;
    if (a.scratch_bytes < work_items * p.max_blocks * sizeof(unsigned)) throw InternalError("rank: scratch too small");
  }
  launch_pdl(p.block_sums.memory ? rank_kernel<ScoreInput::by_sums>
             : p.by_tile         ? rank_kernel<ScoreInput::by_tile>
                                 : rank_kernel<ScoreInput::by_token>,
             dim3(static_cast<unsigned>(work_items * p.cluster)), threads, RankShared::bytes(p), stream, p.cluster, p);
}

void select(const SelectArgs& a, Stream* stream) {
  const std::int64_t work_items = a.tile.rows() * a.shape.groups;
  if (work_items == 0) return;
  const std::size_t shared = a.ranks * a.shape.rules.n_sel * (sizeof(Candidate) + 1);
  launch_pdl(select_kernel, dim3(static_cast<unsigned>(work_items)), 128, shared, stream, 1, a);
}

}  // namespace nsa::gpu
