// Attention by matrix products: what a framework without custom kernels does. `sdpa` gathers what a branch reads into a
// packed buffer unless it already lies in one piece, then GEMM, softmax, GEMM. `masked` (sel, win) multiplies with
// every token there is and masks.
//
// A job is a batch of products by cuBLAS. Either each (row, group) has a K/V of its own (sel: its chosen tokens,
// packed; decode: the plane's cache as it lies) and the heads of the group are the rows of its product, or all rows of
// a (sequence, group) share one K/V (prefill) and the batch is over the heads. Jobs are cut so that packed K and V,
// scores and weights stay within `budget`, most of which an L2 holds.
//
// Bytes, sel: gather reads and writes each chosen K/V row, GEMM reads it again: three times what `fused` moves, and
// 4 + 4 + 2 + 2 bytes a score. V rows that no token was written to are weighed with 0, so they must be finite.

#include <algorithm>

#include "kernels/cuda/attention/sdpa.cuh"
#include "kernels/cuda/attention/stages.cuh"
#include "kernels/cuda/runtime/cublas.cuh"

namespace nsa::gpu {

namespace {

constexpr int span_rows = 256;              // of a job whose window is packed
constexpr std::int64_t most_units = 65535;  // of a job: a grid's y
constexpr std::size_t budget = std::size_t{64} << 20;

std::size_t padded(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

/// Tokens the branch has below max_positions.
std::int64_t tokens_of(Branch branch, const LayerShape& s, const QueryTile& tile) {
  return branch == cmp ? compressed_tokens(s.rules, tile.max_positions - 1) : tile.max_positions;
}

std::int64_t chosen_columns(const LayerShape& s, const QueryTile& tile) {
  return std::min<std::int64_t>(s.rules.n_sel, eligible_blocks(s.rules, tile.max_positions - 1)) * s.rules.l_sel;
}

// Short sequences from their beginning.
std::int64_t span_columns(const LayerShape& s, const QueryTile& tile) {
  return std::min<std::int64_t>(s.rules.w + std::min(tile.tokens, span_rows) - 1, tile.max_positions);
}

/// Memory rows of a rank's own chunks, halos with them, or of the tokens where they are not cut.
std::int64_t rows_of(const RowMap& map, std::int64_t tokens) {
  if (!scores_by_chunk(map)) return tokens;
  const std::int64_t owned = owned_chunks(map, tokens + map.halo, map.rank);
  if (owned == 0) return 0;
  const std::int64_t rest = tokens - ((owned - 1) * map.kv + map.rank) * map.chunk;
  return (owned - 1) * map.stride + map.halo + std::clamp<std::int64_t>(rest, 0, map.chunk);
}

/// The compressed scores are stored for rank, unless rank recomputes them.
bool stores_scores(Branch branch, const AttentionPolicy& policy) { return branch == cmp && !policy.recompute_scores; }

/// Bytes of one unit (a list, or a row of a sequence and group) and what is there once.
struct Needs {
  std::size_t once = 0, unit = 0;
  std::int64_t units = 0;
  std::size_t bytes() const { return once + 1024 + unit * std::clamp<std::size_t>(budget / unit, 1, units); }
};

Needs needs_of(bool stored, Source source, bool per_list, std::int64_t columns, const LayerShape& s,
               const QueryTile& tile) {
  const std::size_t storage = size_of(s.dtype), packed = columns * (s.d_k + s.d_v) * storage;
  Needs needs;
  needs.units = per_list ? tile.rows() * s.groups : tile.tokens;
  needs.unit = s.heads_per_group * padded_columns(columns) * (storage + (stored ? 0 : sizeof(float)));
  if (source == Source::in_place) return needs;
  (per_list ? needs.unit : needs.once) += packed;
  return needs;
}

template <Branch B>
void choose_source(Dense& p) {
  const LayerShape& s = p.a.shape;
  const QueryTile& tile = p.a.tile;
  const RowMap& map = p.a.k.map;
  const bool gathered = map.rank == all_ranks && map.kv > 1;
  p.per_list = tile.tokens == 1;
  if (B == sel && !p.masked) {
    p.source = Source::chosen;
    p.per_list = true;
    p.columns = chosen_columns(s, tile);
  } else if (map.ring > 0) {
    p.source = Source::in_place;
    p.columns = std::max<std::int64_t>(0, std::min({map.slot_end, map.ring, tile.max_positions}) - map.slot_begin);
  } else if (B == win && !p.masked) {
    p.source = Source::span;
    p.columns = span_columns(s, tile);
  } else if (gathered) {
    p.source = Source::whole;
    p.columns = tokens_of(B, s, tile);
  } else {
    p.source = Source::in_place;
    p.columns = rows_of(map, tokens_of(B, s, tile));
  }
  p.weight_ld = padded_columns(p.columns);
}

// Queries, K and V of a job multiplied. Rows of a sequence lie a whole row of heads apart, lists right behind another.
template <Branch B>
void multiply_job(const Dense& p, Stream* stream) {
  const LayerShape& s = p.a.shape;
  const std::int64_t h = s.heads_per_group, heads = s.heads();
  const std::int64_t head =  // of the job's first row, counted through all rows
      p.per_list ? p.first * h : (std::int64_t{p.sequence} * p.a.tile.tokens + p.first) * heads + p.g * h;
  Gemm qk, pv;
  qk.batch = pv.batch = static_cast<int>(p.per_list ? p.count : h);
  qk.m = pv.m = static_cast<int>(p.per_list ? h : p.count);
  qk.n = pv.k = static_cast<int>(p.columns);
  qk.k = s.d_k;
  qk.alpha = log2_e / std::sqrt(static_cast<float>(s.d_k));
  qk.a = static_cast<const char*>(p.a.q) + head * s.d_k * static_cast<std::int64_t>(size_of(s.dtype));
  qk.a_ld = p.per_list ? s.d_k : heads * s.d_k;
  qk.a_stride = p.per_list ? h * s.d_k : s.d_k;
  qk.b = p.k;
  qk.b_ld = s.d_k;
  qk.b_stride = p.per_list ? p.k_stride : 0;
  qk.b_by_rows = true;
  qk.out = p.scores;
  qk.out_ld = p.per_list ? p.score_ld : p.score_row;
  qk.out_stride = p.per_list ? p.score_row : p.score_ld;
  if (B == cmp) {
    qk.n = (qk.n + 3) / 4 * 4;  // as the fixed order asks; what lies behind the last row has scores that nobody reads
    multiply_in_fixed_order(s.dtype, qk, p.per_list ? static_cast<int>(h) : 64, stream);
  } else {
    multiply(s.dtype, qk, stream);
  }
  weigh(B, p, stream);
  if (stores_scores(B, p.a.policy) && scores_by_chunk(p.a.k.map)) spread_scores(p, stream);
  if (p.a.scores_only) return;
  pv.n = s.d_v;
  pv.a = p.weights;
  pv.a_ld = p.per_list ? p.weight_ld : h * p.weight_ld;
  pv.a_stride = p.per_list ? h * p.weight_ld : p.weight_ld;
  pv.b = p.v;
  pv.b_ld = s.d_v;
  pv.b_stride = p.per_list ? p.v_stride : 0;
  pv.out = p.a.out.o + head * s.d_v;
  pv.out_ld = p.per_list ? s.d_v : heads * s.d_v;
  pv.out_stride = p.per_list ? h * s.d_v : s.d_v;
  multiply(s.dtype, pv, stream);
}

/// Where a job's parts of the scratch begin, and how many units fit.
struct Parts {
  char *k, *v, *scores, *weights;
  std::int64_t units;
};

template <Branch B>
Parts divide(const Dense& p, const Needs& needs) {
  const LayerShape& s = p.a.shape;
  const std::size_t storage = size_of(s.dtype), given = p.a.scratch_bytes;
  if (given < needs.once + 1024 + needs.unit) throw InternalError("dense attention: scratch too small for one row");
  Parts parts{};
  parts.units =
      std::min({needs.units, most_units, static_cast<std::int64_t>((given - needs.once - 1024) / needs.unit)});
  if (p.source == Source::span && !p.per_list) parts.units = std::min<std::int64_t>(parts.units, span_rows);
  const std::size_t matrices = p.source == Source::in_place ? 0 : p.per_list ? parts.units : 1;
  char* at = static_cast<char*>(p.a.scratch);
  const auto take = [&](std::size_t bytes) {
    char* begin = at;
    at += padded(bytes);
    return begin;
  };
  parts.k = take(matrices * p.columns * s.d_k * storage);
  parts.v = take(matrices * p.columns * s.d_v * storage);
  parts.scores = take(
      stores_scores(B, p.a.policy) ? 0 : parts.units * s.heads_per_group * padded_columns(p.columns) * sizeof(float));
  parts.weights = at;
  return parts;
}

template <Branch B>
void run_jobs(Dense& p, Stream* stream) {
  const LayerShape& s = p.a.shape;
  const QueryTile& tile = p.a.tile;
  const std::int64_t h = s.heads_per_group, storage = static_cast<std::int64_t>(size_of(s.dtype));
  const Needs needs = needs_of(stores_scores(B, p.a.policy), p.source, p.per_list, p.columns, s, tile);
  const Parts parts = divide<B>(p, needs);
  const bool packed = p.source != Source::in_place;
  const std::int64_t slot = p.a.k.map.ring > 0 ? p.a.k.map.slot_begin : 0;
  const bool stored = stores_scores(B, p.a.policy);
  const std::int64_t pitch = stored ? score_pitch(p.a.k.map, tokens_of(cmp, s, tile)) : padded_columns(p.columns);
  p.score_ld = pitch;
  p.score_row = stored && !p.per_list ? s.heads() * pitch : h * pitch;
  p.weights = parts.weights;
  p.k_stride = packed ? p.columns * s.d_k : p.a.k.plane_stride;
  p.v_stride = packed ? p.columns * s.d_v : p.a.v.plane_stride;
  const auto at_plane = [&](const KvView& view, std::int64_t plane) {
    return static_cast<char*>(view.data) + (plane * view.plane_stride + slot * view.width) * storage;
  };
  const int sequences = p.per_list ? 1 : tile.batches, groups = p.per_list ? 1 : s.groups;
  for (p.sequence = 0; p.sequence < sequences; ++p.sequence)
    for (p.g = 0; p.g < groups; ++p.g)
      for (p.first = 0; p.first < needs.units; p.first += p.count) {
        p.count = std::min(parts.units, needs.units - p.first);
        const std::int64_t plane = std::int64_t{tile.batch_begin} * s.groups +
                                   (p.per_list ? p.first : std::int64_t{p.sequence} * s.groups + p.g);
        p.k = packed ? parts.k : at_plane(p.a.k, plane);
        p.v = packed ? parts.v : at_plane(p.a.v, plane);
        const std::int64_t row_head =
            p.per_list ? p.first * h
                       : (std::int64_t{p.sequence} * tile.tokens + p.first) * s.heads() + std::int64_t{p.g} * h;
        p.scores = stored ? static_cast<float*>(p.a.scores) + row_head * pitch : reinterpret_cast<float*>(parts.scores);
        if (packed && (p.per_list || p.first == 0 || p.source == Source::span))
          gather(p, p.per_list ? p.count : 1, stream);
        multiply_job<B>(p, stream);
      }
}

// No token at all: nothing to multiply. Lanes and (m, s) are those of nothing.
template <Branch B>
void attend_nothing(Dense& p, Stream* stream) {
  const LayerShape& s = p.a.shape;
  p.per_list = true;
  p.first = 0;
  p.count = p.a.tile.rows() * s.groups;
  p.scores = static_cast<float*>(p.a.scores);
  check(cudaMemsetAsync(p.a.out.o, 0, p.a.tile.rows() * s.heads() * s.d_v * sizeof(float), cuda(stream)),
        "cudaMemsetAsync");
  weigh(B, p, stream);
}

template <Branch B>
void attend(const AttendArgs& a, bool masked, Stream* stream) {
  if (a.tile.rows() == 0) return;
  Dense p{};
  p.a = a;
  p.masked = masked;
  choose_source<B>(p);
  if (p.columns == 0)
    attend_nothing<B>(p, stream);
  else
    run_jobs<B>(p, stream);
}

/// A rank's own rows, halos with them, are at most so many more than its tokens (before < leaf <= chunk).
std::int64_t most_rows(const LayerShape& s, std::int64_t tokens) { return tokens + 2 * s.lse.segment + tokens; }

}  // namespace

std::size_t sdpa_scratch(const LayerShape& s, const QueryTile& tile, const AttentionPolicy& policy) {
  const bool per_list = tile.tokens == 1;
  const std::int64_t compressed = tokens_of(cmp, s, tile);
  std::size_t most = needs_of(false, Source::chosen, true, chosen_columns(s, tile), s, tile).bytes();
  const auto also = [&](Branch branch, Source source, std::int64_t columns) {
    if (columns > 0)
      most = std::max(most, needs_of(stores_scores(branch, policy), source, per_list, columns, s, tile).bytes());
  };
  also(win, Source::span, span_columns(s, tile));
  also(cmp, Source::whole, compressed);
  also(cmp, Source::in_place, most_rows(s, compressed));
  return most;
}

std::size_t masked_scratch(const LayerShape& s, const QueryTile& tile) {
  const bool per_list = tile.tokens == 1;
  return std::max(needs_of(false, Source::whole, per_list, tile.max_positions, s, tile).bytes(),
                  needs_of(false, Source::in_place, per_list, tile.max_positions, s, tile).bytes());
}

bool masked_accepts(const LayerShape& s, const QueryTile& tile) {
  const Needs one =
      needs_of(false, Source::whole, tile.tokens == 1, std::max<std::int64_t>(1, tile.max_positions), s, tile);
  return one.once + one.unit <= budget;
}

void attend_sdpa(Branch branch, const AttendArgs& a, Stream* stream) {
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
