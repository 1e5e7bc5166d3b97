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

#include "kernels/cuda/blas.cuh"
#include "kernels/cuda/stages.cuh"

namespace nsa::gpu {

namespace {

constexpr int threads = 256;
constexpr int warps = threads / 32;
constexpr int span_rows = 256;              // of a job whose window is packed
constexpr int pack_columns = 32;            // of a CTA
constexpr std::int64_t most_units = 65535;  // of a job: a grid's y
constexpr std::size_t budget = std::size_t{64} << 20;

// Where column j of K and V comes from.
enum class Source {
  in_place,  // the memory rows of the plane from its first one (ring: from slot_begin)
  chosen,    // packed: token j % l' of chosen block j / l'
  span,      // packed: the window of the tile's rows, from its first token on
  whole      // packed: token j of the sequence
};

struct Dense {
  AttendArgs a;
  Source source;
  bool masked;    // sel: all tokens, of which the chosen ones count
  bool per_list;  // each (row, group) its own K/V
  std::int64_t columns, weight_ld;
  void *k, *v;                      // of the first matrix: packed, or in place
  std::int64_t k_stride, v_stride;  // between matrices, elements
  float* scores;                    // [row][head]: base + row * score_row + head * score_ld
  std::int64_t score_row, score_ld;
  void* weights;  // [row or list of the job][h][weight_ld], storage type
  // The job: lists (row * groups + g) first .. first + count of the tile, or its rows of (sequence, g).
  std::int64_t first, count;
  int sequence, g;
};

struct Column {
  std::int64_t token;  // -1: none
  bool halo;           // scored here, attended elsewhere
};

// has_row without its divisions where nothing is cut.
__device__ bool holds(const RowMap& map, std::int64_t i) {
  return (map.chunk == INT64_MAX && map.ring == 0) || has_row(map, i);
}

__device__ Column column_at(const Dense& p, const std::int32_t* chosen, std::int64_t t, std::int64_t j) {
  const RowMap& map = p.a.k.map;
  const BlockRules& r = p.a.shape.rules;
  if (p.source == Source::chosen) {
    const unsigned at = static_cast<unsigned>(j), l = static_cast<unsigned>(r.l_sel);
    const std::int64_t block = chosen[at / l], i = block * r.l_sel + at % l;
    return {block < 0 || i > t || !holds(map, i) ? -1 : i, false};
  }
  if (p.source == Source::whole) return {j, false};
  if (p.source == Source::span) {
    const std::int64_t row = p.per_list ? 0 : p.first;  // the job's first
    const std::int64_t i = (p.columns == p.a.tile.max_positions ? 0 : *p.a.tile.first_position + row + 1 - r.w) + j;
    return {i < 0 || i > t || !holds(map, i) ? -1 : i, false};
  }
  if (map.ring > 0) {
    const std::int64_t back = (t % map.ring - (map.slot_begin + j) + 2 * map.ring) % map.ring;
    return {t - back, false};  // negative: not written yet
  }
  if (map.chunk == INT64_MAX) return {j, false};
  const std::int64_t chunk = map.rank == all_ranks ? j / map.stride : j / map.stride * map.kv + map.rank;
  const std::int64_t at = j % map.stride - map.before;
  return {at >= map.chunk ? -1 : chunk * map.chunk + at, at < 0};
}

// Whether the block is among the row's, which rise and are padded with -1.
__device__ bool is_chosen(const std::int32_t* chosen, int n, std::int64_t block) {
  int low = 0, high = n;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (chosen[middle] < 0 || chosen[middle] >= block)
      high = middle;
    else
      low = middle + 1;
  }
  return low < n && chosen[low] == block;
}

template <Branch B>
__device__ bool attends(const Dense& p, const std::int32_t* chosen, std::int64_t t, std::int64_t n, Column c) {
  const BlockRules& r = p.a.shape.rules;
  if (c.token < 0 || c.halo) return false;
  if (B == cmp) return c.token < n;
  if (B == win) return c.token <= t && c.token >= window_begin(r, t);
  return c.token <= t && (!p.masked || is_chosen(chosen, r.n_sel, c.token / r.l_sel));
}

__device__ const std::int32_t* chosen_blocks(const Dense& p, std::int64_t list) {
  return p.a.selected ? p.a.selected + list * p.a.shape.rules.n_sel : nullptr;
}

// The packed rows of K and V, 16 bytes (V16) or one element at a time; zero where there is no token. A CTA takes
// pack_columns columns of a matrix. Chosen tokens are counted here, where they are loaded.
template <class V>
__global__ void __launch_bounds__(threads) pack(const __grid_constant__ Dense p, int storage) {
  const LayerShape& s = p.a.shape;
  const std::int64_t matrix = blockIdx.y, list = p.first + matrix;
  const TileRow row = tile_row(
      p.a.tile, p.per_list ? list / s.groups : std::int64_t{p.sequence} * p.a.tile.tokens + p.a.tile.tokens - 1);
  const std::int64_t g = p.per_list ? list % s.groups : p.g;
  const std::int64_t plane = (p.a.tile.batch_begin + row.sequence) * s.groups + g;
  const std::int32_t* chosen = chosen_blocks(p, list);
  __shared__ std::int64_t from[pack_columns][2];  // of K and V, elements; negative: none
  int counted = 0;
  if (threadIdx.x < pack_columns) {
    const std::int64_t j = std::int64_t{blockIdx.x} * pack_columns + threadIdx.x;
    const std::int64_t i = j < p.columns ? column_at(p, chosen, row.t, j).token : -1;
    from[threadIdx.x][0] = i < 0 ? -1 : offset_of(p.a.k, plane, i);
    from[threadIdx.x][1] = i < 0 ? -1 : offset_of(p.a.v, plane, i);
    counted = i >= 0;
  }
  __syncthreads();
  const int of_k = s.d_k * storage / static_cast<int>(sizeof(V)), of_v = s.d_v * storage / static_cast<int>(sizeof(V));
  const std::int64_t first = std::int64_t{blockIdx.x} * pack_columns;
  const int here = static_cast<int>(min(std::int64_t{pack_columns}, p.columns - first));
  for (int item = threadIdx.x; item < here * (of_k + of_v); item += threads) {
    const int column = item / (of_k + of_v), at = item % (of_k + of_v);
    const bool value = at >= of_k;
    const int width = value ? of_v : of_k, e = value ? at - of_k : at;
    const char* data = static_cast<const char*>(value ? p.a.v.data : p.a.k.data);
    const std::int64_t row_at = from[column][value];
    V* to = static_cast<V*>(value ? p.v : p.k) + (matrix * p.columns + first + column) * width + e;
    *to = row_at < 0 ? V{} : reinterpret_cast<const V*>(data + row_at * storage)[e];
  }
  if (p.source != Source::chosen) return;
  const int sum = __reduce_add_sync(0xffffffffu, counted);
  if (threadIdx.x % 32 == 0 && sum > 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(p.a.reads) + row.sequence * s.groups + g,
              static_cast<unsigned long long>(sum));
}

// (m, sum) of one leaf by a warp; the same whatever the layout: strips of 32 tokens by rising index.
__device__ MaxSum leaf_sum(const float* scores, std::int64_t begin, std::int64_t count) {
  MaxSum leaf;
  for (std::int64_t at = 0; at < count; at += 32) {
    const std::int64_t i = at + threadIdx.x % 32;
    const float score = i < count ? scores[begin + i] : -INFINITY;
    const float m = warp_max(score), sum = warp_sum(score == -INFINITY ? 0.0f : exp2_fast(score - m));
    const float top = fmaxf(leaf.m, m);
    if (top > -INFINITY) leaf = {top, leaf.s * exp2_fast(leaf.m - top) + sum * exp2_fast(m - top)};
  }
  return leaf;
}

__device__ MaxSum merge_powers(MaxSum a, MaxSum b) {
  const float m = fmaxf(a.m, b.m);
  if (m == -INFINITY) return {};
  return {m, a.s * exp2_fast(a.m - m) + b.s * exp2_fast(b.m - m)};
}

__device__ void write_sum(float* ms, MaxSum x) {
  ms[0] = x.s > 0.0f ? x.m / log2_e : -INFINITY;
  ms[1] = x.s;
}

// The lanes of one (row, head), a warp a lane, and their union in lane order.
__device__ MaxSum compressed_lanes(const Dense& p, const float* scores, std::int64_t n, std::int64_t row,
                                   std::int64_t head, MaxSum* lanes) {
  const LayerShape& s = p.a.shape;
  const RowMap& map = p.a.k.map;
  const bool sharded = map.rank != all_ranks && map.kv > 1;
  const int kv = sharded ? map.kv : 1, present = s.lanes / kv;
  for (int slot = threadIdx.x / 32; slot < present; slot += warps) {
    MaxSum lane;
    for (std::int64_t c = std::int64_t{slot} * kv + (sharded ? map.rank : 0); c * s.leaf < n; c += s.lanes) {
      const std::int64_t begin = c * s.leaf, end = begin + s.leaf < n ? begin + s.leaf : n;
      const std::int64_t column = sharded ? row_in_chunk(map, c, begin) : begin;
      lane = merge_powers(lane, leaf_sum(scores, column, end - begin));
    }
    if (threadIdx.x % 32 != 0) continue;
    lanes[slot] = lane;
    if (!p.a.tile.rescores) write_sum(p.a.lse + ((slot * p.a.tile.rows() + row) * s.heads() + head) * 2, lane);
  }
  __syncthreads();
  MaxSum total;
  for (int slot = 0; slot < present; ++slot) total = merge_powers(total, lanes[slot]);
  return total;
}

// Over the CTA, for all of its threads; `nothing` changes no result.
template <class Reduce>
__device__ float over_cta(float x, float nothing, float* shared, Reduce reduce) {
  x = reduce(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  return reduce(threadIdx.x % 32 < warps ? shared[threadIdx.x % 32] : nothing);
}

// A CTA a (row, head): scores to weights relative to their maximum, zero where masked. Scores count in powers of two.
// Shared memory: cmp: the lanes.
template <class T, Branch B>
__global__ void __launch_bounds__(threads) soften(const __grid_constant__ Dense p) {
  extern __shared__ MaxSum lanes[];
  __shared__ float partial[warps];
  const LayerShape& s = p.a.shape;
  const std::int64_t unit = blockIdx.x, j = blockIdx.y, list = p.first + unit;
  const std::int64_t r = p.per_list ? list / s.groups : std::int64_t{p.sequence} * p.a.tile.tokens + p.first + unit;
  const std::int64_t g = p.per_list ? list % s.groups : p.g;
  const std::int64_t head = g * s.heads_per_group + j;
  const TileRow row = tile_row(p.a.tile, r);
  const std::int32_t* chosen = chosen_blocks(p, r * s.groups + g);
  const std::int64_t n = B == cmp ? compressed_tokens(s.rules, row.t) : 0;
  const float* scores = p.scores + unit * p.score_row + j * p.score_ld;
  // Who is attended is found once, and again only past the thread's 64th column.
  const auto look = [&](std::int64_t i) { return attends<B>(p, chosen, row.t, n, column_at(p, chosen, row.t, i)); };
  std::uint64_t seen = 0;
  MaxSum total;
  if constexpr (B == cmp) {
    total = compressed_lanes(p, scores, n, r, head, lanes);
  } else {
    int k = 0;
    for (std::int64_t i = threadIdx.x; i < p.columns; i += threads, ++k) {
      if (!look(i)) continue;
      if (k < 64) seen |= std::uint64_t{1} << k;
      total.m = fmaxf(total.m, scores[i]);
    }
    total.m = over_cta(total.m, -INFINITY, partial, [](float x) { return warp_max(x); });
  }
  T* weights = static_cast<T*>(p.weights) + (unit * s.heads_per_group + j) * p.weight_ld;
  float sum = 0.0f, counted = 0.0f;
  int k = 0;
  for (std::int64_t i = threadIdx.x; i < p.columns; i += threads, ++k) {
    const bool here = B != cmp && k < 64 ? seen >> k & 1 : look(i);
    const float weight = here ? exp2_fast(scores[i] - total.m) : 0.0f;
    if (!p.a.scores_only) store(weights + i, weight);
    sum += weight;
    counted += here;
  }
  if constexpr (B != cmp) total.s = over_cta(sum, 0.0f, partial, [](float x) { return warp_sum(x); });
  if (j == 0 && p.source != Source::chosen) {
    counted = over_cta(counted, 0.0f, partial, [](float x) { return warp_sum(x); });  // exact below 2^24 a thread
    if (threadIdx.x == 0 && counted > 0.0f)
      atomicAdd(reinterpret_cast<unsigned long long*>(p.a.reads) + row.sequence * s.groups + g,
                static_cast<unsigned long long>(counted));
  }
  if (threadIdx.x == 0 && (!p.a.scores_only || p.a.tile.rescores))
    write_sum(p.a.out.ms + (r * s.heads() + head) * 2, total);
}

std::int64_t padded_weights(std::int64_t columns) { return (columns + 7) / 8 * 8; }
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

/// The compressed scores go where rank finds them, unless rank forms its own.
bool leaves_scores(Branch branch, const QueryTile& tile) { return branch == cmp && !tile.rescores; }

/// Bytes of one unit (a list, or a row of a sequence and group) and what is there once.
struct Needs {
  std::size_t once = 0, unit = 0;
  std::int64_t units = 0;
  std::size_t bytes() const { return once + 1024 + unit * std::clamp<std::size_t>(budget / unit, 1, units); }
};

Needs needs_of(Branch branch, Source source, bool per_list, std::int64_t columns, const LayerShape& s,
               const QueryTile& tile) {
  const std::size_t storage = size_of(s.dtype), packed = columns * (s.d_k + s.d_v) * storage;
  Needs needs;
  needs.units = per_list ? tile.rows() * s.groups : tile.tokens;
  needs.unit = s.heads_per_group *
               (padded_weights(columns) * storage + (leaves_scores(branch, tile) ? 0 : columns * sizeof(float)));
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
    p.columns = score_columns(map, tokens_of(B, s, tile));
  }
  p.weight_ld = padded_weights(p.columns);
}

template <Branch B>
void weigh(const Dense& p, Stream* stream) {
  const LayerShape& s = p.a.shape;
  const std::size_t lanes = B == cmp ? s.lanes * sizeof(MaxSum) : 0;
  with_type(s.dtype, [&](auto type) {
    auto* kernel = soften<decltype(type), B>;
    allow_shared(kernel, lanes);
    kernel<<<dim3(static_cast<unsigned>(p.count), s.heads_per_group), threads, lanes, cuda(stream)>>>(p);
  });
  check_launch("soften");
}

void gather(const Dense& p, std::int64_t matrices, Stream* stream) {
  const LayerShape& s = p.a.shape;
  const int storage = static_cast<int>(size_of(s.dtype));
  const dim3 grid(static_cast<unsigned>((p.columns + pack_columns - 1) / pack_columns),
                  static_cast<unsigned>(matrices));
  if (s.d_k * storage % 16 == 0 && s.d_v * storage % 16 == 0)
    pack<uint4><<<grid, threads, 0, cuda(stream)>>>(p, storage);
  else
    pack<unsigned short><<<grid, threads, 0, cuda(stream)>>>(p, storage);
  check_launch("pack");
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
  if (B == cmp)
    multiply_in_fixed_order(s.dtype, qk, p.per_list ? static_cast<int>(h) : 64, stream);
  else
    multiply(s.dtype, qk, stream);
  weigh<B>(p, stream);
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
  parts.scores = take(leaves_scores(B, p.a.tile) ? 0 : parts.units * s.heads_per_group * p.columns * sizeof(float));
  parts.weights = at;
  return parts;
}

template <Branch B>
void run_jobs(Dense& p, Stream* stream) {
  const LayerShape& s = p.a.shape;
  const QueryTile& tile = p.a.tile;
  const std::int64_t h = s.heads_per_group, storage = static_cast<std::int64_t>(size_of(s.dtype));
  const Needs needs = needs_of(B, p.source, p.per_list, p.columns, s, tile);
  const Parts parts = divide<B>(p, needs);
  const bool packed = p.source != Source::in_place;
  const std::int64_t slot = p.a.k.map.ring > 0 ? p.a.k.map.slot_begin : 0;
  const bool leaves = leaves_scores(B, tile);
  const std::int64_t pitch = leaves ? score_pitch(p.a.k.map, tokens_of(cmp, s, tile)) : p.columns;
  p.score_ld = pitch;
  p.score_row = leaves && !p.per_list ? s.heads() * pitch : h * pitch;
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
        p.scores = leaves ? static_cast<float*>(p.a.scores) + row_head * pitch : reinterpret_cast<float*>(parts.scores);
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
  weigh<B>(p, stream);
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
std::int64_t most_rows(const LayerShape& s, std::int64_t tokens) { return tokens + 2 * s.leaf + tokens; }

}  // namespace

std::size_t sdpa_scratch(const LayerShape& s, const QueryTile& tile) {
  const bool per_list = tile.tokens == 1;
  const std::int64_t compressed = tokens_of(cmp, s, tile);
  std::size_t most = needs_of(sel, Source::chosen, true, chosen_columns(s, tile), s, tile).bytes();
  const auto also = [&](Branch branch, Source source, std::int64_t columns) {
    if (columns > 0) most = std::max(most, needs_of(branch, source, per_list, columns, s, tile).bytes());
  };
  also(win, Source::span, span_columns(s, tile));
  also(cmp, Source::whole, compressed);
  also(cmp, Source::in_place, most_rows(s, compressed));
  return most;
}

std::size_t masked_scratch(const LayerShape& s, const QueryTile& tile) {
  const bool per_list = tile.tokens == 1;
  return std::max(needs_of(sel, Source::whole, per_list, tile.max_positions, s, tile).bytes(),
                  needs_of(sel, Source::in_place, per_list, tile.max_positions, s, tile).bytes());
}

bool masked_accepts(const LayerShape& s, const QueryTile& tile) {
  const Needs one =
      needs_of(sel, Source::whole, tile.tokens == 1, std::max<std::int64_t>(1, tile.max_positions), s, tile);
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
