// Attention by matrix products, as a framework without custom kernels does it. `sdpa_gemm` packs the tokens a branch
// reads into a buffer unless they are contiguous already, then runs GEMM, softmax, GEMM. `masked` (sel, win) multiplies
// with every token and masks.
//
// A job is one batched cuBLAS product. Either each (row, group) has its own K/V (sel: its selected tokens, packed;
// decode: the cache plane in place) and the heads of the group are the rows of its product, or all rows of a (sequence,
// group) share one K/V (prefill) and the batch is over the heads. Jobs are sized so that packed K and V, scores and P
// stay within `gemm_budget`, most of which an L2 holds.
//
// Bytes, sel: the gather reads and writes each selected K/V row and the GEMM reads it again, three times the bytes of
// `fused`, plus 4 + 4 + 2 + 2 bytes a score. V rows without a token are multiplied by P = 0, so they must be finite.

#include <algorithm>

#include "kernels/cuda/attention/sdpa/gemm.cuh"
#include "kernels/cuda/attention/stages.cuh"
#include "kernels/cuda/runtime/cublas.cuh"
#include "kernels/cuda/sizes/scratch.hpp"

namespace nsa::gpu {

namespace {

/// Memory rows of a rank's own chunks with their halos; of an uncut cache the tokens.
std::int64_t rows_of(const RowMap& map, std::int64_t tokens) {
  if (!scores_by_chunk(map)) return tokens;
  const std::int64_t owned = owned_chunks(map, tokens + map.halo, map.rank);
  if (owned == 0) return 0;
  const std::int64_t rest = tokens - ((owned - 1) * map.kv + map.rank) * map.chunk;
  return (owned - 1) * map.stride + map.halo + std::clamp<std::int64_t>(rest, 0, map.chunk);
}

template <Branch B>
void choose_source(SdpaJob& p) {
  const LayerShape& s = p.a.shape;
  const QueryTile& tile = p.a.tile;
  const RowMap& map = p.a.k.map;
  const bool gathered = map.rank == all_ranks && map.kv > 1;
  p.own_kv = tile.tokens == 1;
  if (B == sel && !p.masked) {
    p.source = Source::selected_blocks;
    p.own_kv = true;
    p.columns = selected_columns(s, tile);
  } else if (map.ring > 0) {
    p.source = Source::in_place;
    p.columns = std::max<std::int64_t>(0, std::min({map.slot_end, map.ring, tile.max_positions}) - map.slot_begin);
  } else if (B == win && !p.masked) {
    p.source = Source::window;
    p.columns = window_columns(s, tile);
  } else if (gathered) {
    p.source = Source::whole;
    p.columns = tokens_of(B, s, tile);
  } else {
    p.source = Source::in_place;
    p.columns = rows_of(map, tokens_of(B, s, tile));
  }
  p.prob_ld = padded_columns(p.columns);
}

// The products of a job. Rows of a sequence are a whole row of heads apart; (row, group) work items are adjacent.
template <Branch B>
void multiply_job(const SdpaJob& p, Stream* stream) {
  const LayerShape& s = p.a.shape;
  const std::int64_t h = s.heads_per_group, heads = s.heads();
  const std::int64_t head =  // of the first row of the job, counted through all rows
      p.own_kv ? p.first * h : (std::int64_t{p.sequence} * p.a.tile.tokens + p.first) * heads + p.g * h;
  Gemm qk, pv;
  qk.batch = pv.batch = static_cast<int>(p.own_kv ? p.count : h);
  qk.m = pv.m = static_cast<int>(p.own_kv ? h : p.count);
  qk.n = pv.k = static_cast<int>(p.columns);
  qk.k = s.d_k;
  qk.alpha = log2_e / std::sqrt(static_cast<float>(s.d_k));
  qk.a = static_cast<const char*>(p.a.q) + head * s.d_k * static_cast<std::int64_t>(size_of(s.dtype));
  qk.a_ld = p.own_kv ? s.d_k : heads * s.d_k;
  qk.a_stride = p.own_kv ? h * s.d_k : s.d_k;
  qk.b = p.k;
  qk.b_ld = s.d_k;
  qk.b_stride = p.own_kv ? p.k_stride : 0;
  qk.b_by_rows = true;
  qk.out = p.scores;
  qk.out_ld = p.own_kv ? p.score_ld : p.score_row;
  qk.out_stride = p.own_kv ? p.score_row : p.score_ld;
  if (B == cmp) {
    qk.n = (qk.n + 3) / 4 * 4;  // the fixed order needs a multiple of 4; scores past the last row are not read
    multiply_in_fixed_order(s.dtype, qk, p.own_kv ? static_cast<int>(h) : 64, stream);
  } else {
    multiply(s.dtype, qk, stream);
  }
  softmax(B, p, stream);
  if (stores_scores(B, p.a.policy) && scores_by_chunk(p.a.k.map)) spread_scores(p, stream);
  if (p.a.scores_only) return;
  pv.n = s.d_v;
  pv.a = p.prob;
  pv.a_ld = p.own_kv ? p.prob_ld : h * p.prob_ld;
  pv.a_stride = p.own_kv ? h * p.prob_ld : p.prob_ld;
  pv.b = p.v;
  pv.b_ld = s.d_v;
  pv.b_stride = p.own_kv ? p.v_stride : 0;
  pv.out = p.a.out.o + head * s.d_v;
  pv.out_ld = p.own_kv ? s.d_v : heads * s.d_v;
  pv.out_stride = p.own_kv ? h * s.d_v : s.d_v;
  multiply(s.dtype, pv, stream);
}

/// Scratch of a job by use, and the work items that fit.
struct JobScratch {
  char *k, *v, *scores, *prob;
  std::int64_t work_items;
};

template <Branch B>
JobScratch divide_scratch(const SdpaJob& p, const ScratchNeeds& needs) {
  const LayerShape& s = p.a.shape;
  const std::size_t storage = size_of(s.dtype), given = p.a.scratch_bytes;
  if (given < needs.once + 1024 + needs.work_item)
    throw InternalError("dense attention: scratch too small for one row");
  JobScratch scratch{};
  scratch.work_items = std::min(
      {needs.work_items, max_job_items, static_cast<std::int64_t>((given - needs.once - 1024) / needs.work_item)});
  if (p.source == Source::window && !p.own_kv)
    scratch.work_items = std::min<std::int64_t>(scratch.work_items, max_window_rows);
  const std::size_t matrices = p.source == Source::in_place ? 0 : p.own_kv ? scratch.work_items : 1;
  char* at = static_cast<char*>(p.a.scratch);
  const auto take = [&](std::size_t bytes) {
    char* begin = at;
    at += padded(bytes);
    return begin;
  };
  scratch.k = take(matrices * p.columns * s.d_k * storage);
  scratch.v = take(matrices * p.columns * s.d_v * storage);
  scratch.scores = take(stores_scores(B, p.a.policy)
                            ? 0
                            : scratch.work_items * s.heads_per_group * padded_columns(p.columns) * sizeof(float));
  scratch.prob = at;
  return scratch;
}

template <Branch B>
void run_jobs(SdpaJob& p, Stream* stream) {
  const LayerShape& s = p.a.shape;
  const QueryTile& tile = p.a.tile;
  const std::int64_t h = s.heads_per_group, storage = static_cast<std::int64_t>(size_of(s.dtype));
  const ScratchNeeds needs = scratch_needs(stores_scores(B, p.a.policy), p.source, p.own_kv, p.columns, s, tile);
  const JobScratch scratch = divide_scratch<B>(p, needs);
  const bool packed = p.source != Source::in_place;
  const std::int64_t slot = p.a.k.map.ring > 0 ? p.a.k.map.slot_begin : 0;
  const bool stores = stores_scores(B, p.a.policy);
  const std::int64_t pitch = stores ? score_pitch(p.a.k.map, tokens_of(cmp, s, tile)) : padded_columns(p.columns);
  p.score_ld = pitch;
  p.score_row = stores && !p.own_kv ? s.heads() * pitch : h * pitch;
  p.prob = scratch.prob;
  p.k_stride = packed ? p.columns * s.d_k : p.a.k.plane_stride;
  p.v_stride = packed ? p.columns * s.d_v : p.a.v.plane_stride;
  const auto at_plane = [&](const KvView& view, std::int64_t plane) {
    return static_cast<char*>(view.data) + (plane * view.plane_stride + slot * view.width) * storage;
  };
  const int sequences = p.own_kv ? 1 : tile.batches, groups = p.own_kv ? 1 : s.groups;
  for (p.sequence = 0; p.sequence < sequences; ++p.sequence)
    for (p.g = 0; p.g < groups; ++p.g)
      for (p.first = 0; p.first < needs.work_items; p.first += p.count) {
        p.count = std::min(scratch.work_items, needs.work_items - p.first);
        const std::int64_t plane = std::int64_t{tile.batch_begin} * s.groups +
                                   (p.own_kv ? p.first : std::int64_t{p.sequence} * s.groups + p.g);
        p.k = packed ? scratch.k : at_plane(p.a.k, plane);
        p.v = packed ? scratch.v : at_plane(p.a.v, plane);
        const std::int64_t row_head =
            p.own_kv ? p.first * h
                     : (std::int64_t{p.sequence} * tile.tokens + p.first) * s.heads() + std::int64_t{p.g} * h;
        p.scores =
            stores ? static_cast<float*>(p.a.scores) + row_head * pitch : reinterpret_cast<float*>(scratch.scores);
        if (packed && (p.own_kv || p.first == 0 || p.source == Source::window))
          gather(p, p.own_kv ? p.count : 1, stream);
        multiply_job<B>(p, stream);
      }
}

// No token at all: o is zero, LSE buckets and (m, s) are empty.
template <Branch B>
void attend_empty(SdpaJob& p, Stream* stream) {
  const LayerShape& s = p.a.shape;
  p.own_kv = true;
  p.first = 0;
  p.count = p.a.tile.rows() * s.groups;
  p.scores = static_cast<float*>(p.a.scores);
  check(cudaMemsetAsync(p.a.out.o, 0, p.a.tile.rows() * s.heads() * s.d_v * sizeof(float), cuda(stream)),
        "cudaMemsetAsync");
  softmax(B, p, stream);
}

template <Branch B>
void attend(const AttendArgs& a, bool masked, Stream* stream) {
  if (a.tile.rows() == 0) return;
  SdpaJob p{};
  p.a = a;
  p.masked = masked;
  choose_source<B>(p);
  if (p.columns == 0)
    attend_empty<B>(p, stream);
  else
    run_jobs<B>(p, stream);
}

}  // namespace

void attend_gemm(Branch branch, const AttendArgs& a, Stream* stream) {
  if (branch == cmp)
    attend<cmp>(a, false, stream);
  else if (branch == sel)
    attend<sel>(a, false, stream);
  else
    attend<win>(a, false, stream);
}

void attend_masked(Branch branch, const AttendArgs& a, Stream* stream) {
  if (branch == sel)
    attend<sel>(a, true, stream);
  else
    attend<win>(a, true, stream);
}

}  // namespace nsa::gpu
