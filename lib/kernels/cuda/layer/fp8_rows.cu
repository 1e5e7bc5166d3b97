// FP8 rows: stored quantised, or rounded in place after the stage that stored them in storage type. A warp a row: it
// reads or forms the row for its largest magnitude, then again to convert it. Bound: the bytes of the rows in storage
// type, read twice, the second time from the L2; fill_rows by Philox. In a decode step, of few rows, the bound is
// latency: a warp holds a row of up to 256 values in registers.

#include <algorithm>

#include "kernels/cuda/layer/append_compress.cuh"
#include "kernels/cuda/layer/fp8_rows.cuh"
#include "kernels/shared/checksum.hpp"
#include "kernels/shared/e4m3.hpp"
#include "kernels/shared/random.hpp"

namespace nsa::gpu {

namespace {

constexpr int threads = 256, warps = threads / 32;

dim3 blocks_for(std::int64_t rows) {
  return dim3(static_cast<unsigned>(std::clamp<std::int64_t>((rows + warps - 1) / warps, 1, limits().sms * 16)));
}

__device__ std::int64_t first_row() { return std::int64_t{blockIdx.x} * warps + threadIdx.x / 32; }
__device__ std::int64_t row_step() { return std::int64_t{gridDim.x} * warps; }

/// The scale of a row of `width` values value(e). All lanes of a warp, as below.
template <class Value>
__device__ std::uint8_t scale_byte_of(int width, Value value) {
  std::uint32_t largest = 0;
  for (int e = threadIdx.x % 32; e < width; e += 32) largest = max(largest, magnitude_bits(value(e)));
  return row_scale_byte(__reduce_max_sync(0xffffffffu, largest));
}

/// A row as its FP8 form gives it back, which storage type holds exactly.
template <class T>
__device__ void round_row(T* row, int width) {
  const std::uint8_t byte = scale_byte_of(width, [&](int e) { return to_float(row[e]); });
  const float factor = row_factor(byte), scale = row_scale(byte);
  for (int e = threadIdx.x % 32; e < width; e += 32)
    store(&row[e], e4m3_value(e4m3_of(to_float(row[e]) * factor)) * scale);
}

/// Stores value(e), which storage type holds, as row i of chunk c or of its halo of a quantised view.
template <class Value>
__device__ void quantise_row(const KvView& view, std::int64_t plane, std::int64_t c, std::int64_t i, Value value) {
  if (!writes_row(view, plane, c, i)) return;
  const std::uint8_t byte = scale_byte_of(view.width, value);
  const float factor = row_factor(byte);
  auto* to = static_cast<std::uint8_t*>(view.data) + offset_in_chunk(view, plane, c, i);
  for (int e = threadIdx.x % 32; e < view.width; e += 32) to[e] = e4m3_of(value(e) * factor);
  if (threadIdx.x % 32 == 0) view.scales[scale_in_chunk(view, plane, c, i)] = byte;
}

/// The same of a row that a warp holds: x[k] is the value of e = 32 k + lane.
template <int N>
__device__ void quantise_held_row(const KvView& view, std::int64_t plane, std::int64_t c, std::int64_t i,
                                  const float (&x)[N]) {
  if (!writes_row(view, plane, c, i)) return;
  const int lane = threadIdx.x % 32;
  std::uint32_t largest = 0;
#pragma unroll
  for (int k = 0; k < N; ++k) largest = max(largest, k * 32 + lane < view.width ? magnitude_bits(x[k]) : 0);
  const std::uint8_t byte = row_scale_byte(__reduce_max_sync(0xffffffffu, largest));
  const float factor = row_factor(byte);
  auto* to = static_cast<std::uint8_t*>(view.data) + offset_in_chunk(view, plane, c, i) + lane;
#pragma unroll
  for (int k = 0; k < N; ++k)
    if (k * 32 + lane < view.width) to[k * 32] = e4m3_of(x[k] * factor);
  if (lane == 0) view.scales[scale_in_chunk(view, plane, c, i)] = byte;
}

/// x rounded to storage type.
template <class T>
__device__ float as_stored(float x) {
  T stored;
  store(&stored, x);
  return to_float(stored);
}

/// Calls f with a value of the storage type. There is no FP8 form of fp16 caches.
template <class F>
void with_storage(DType type, F f) {
  if (type == DType::f16) throw InternalError("fp16 caches have no FP8 rows");
  type == DType::bf16 ? f(__nv_bfloat16{}) : f(float{});
}

/// Calls body(c) for the chunks whose memory holds row i: its own, the next one's halo, the one before's further rows.
template <class Body>
__device__ void for_each_place(const KvView& view, std::int64_t i, Body body) {
  const RowMap& map = view.map;
  if (map.ring > 0) return body(0);
  const std::int64_t c = chunk_of(map, i), k = i - chunk_begin(map, c),
                     after = map.stride == INT64_MAX ? 0 : map.stride - map.halo - map.chunk;
  if (has_chunk(map, c)) body(c);
  if (map.rank == all_ranks) return;
  if (map.halo > 0 && k >= map.chunk - map.halo && has_chunk(map, c + 1) &&
      (row_in_chunk(map, c + 1, i) + 1) * view.width <= view.plane_stride)
    body(c + 1);
  if (k < after && c > 0 && has_chunk(map, c - 1)) body(c - 1);
}

template <class T>
__device__ void round_row_of(const KvView& view, std::int64_t plane, std::int64_t c, std::int64_t i) {
  if (!writes_row(view, plane, c, i)) return;
  round_row(static_cast<T*>(view.data) + offset_in_chunk(view, plane, c, i), view.width);
}

template <class T>
__global__ void round_appended_kernel(QueryTile tile, int groups, KvView k, KvView v) {
  griddep_wait();
  const std::int64_t rows = tile.rows() * groups;
  for (std::int64_t item = first_row(); item < 2 * rows; item += row_step()) {
    const KvView& view = item < rows ? k : v;
    const std::int64_t r = item % rows / groups, g = item % groups;
    const TileRow row = tile_row(tile, r);
    if (!is_kept(view.map, tile, r % tile.tokens, row.t)) continue;
    const std::int64_t c = view.map.ring > 0 ? 0 : chunk_of(view.map, row.t);
    round_row_of<T>(view, (tile.batch_begin + row.sequence) * groups + g, c, row.t);
  }
}

template <class T>
__global__ void round_compressed_kernel(CompressArgs a, std::int64_t max_tokens) {
  griddep_wait();
  const std::int64_t planes = std::int64_t{a.tile.batches} * a.shape.groups, items = planes * max_tokens;
  for (std::int64_t item = first_row(); item < 2 * items; item += row_step()) {
    const KvView& view = item < items ? a.k_cmp : a.v_cmp;
    const std::int64_t in_tile = item % items / max_tokens;
    const TokenRange tokens = completed(a.shape, a.tile, in_tile / a.shape.groups);
    const std::int64_t i = tokens.begin + item % max_tokens, c = chunk_of(view.map, i);
    if (i >= tokens.end || !is_wanted(view, a.fill_halo, i)) continue;
    const std::int64_t plane = std::int64_t{a.tile.batch_begin} * a.shape.groups + in_tile;
    const RowMap& m = view.map;
    if (has_chunk(m, c)) round_row_of<T>(view, plane, c, i);
    if (a.fill_halo && m.halo > 0 && m.rank != all_ranks && i >= (c + 1) * m.chunk - m.halo && has_chunk(m, c + 1))
      round_row_of<T>(view, plane, c + 1, i);
  }
}

template <class T>
__global__ void round_rows_kernel(KvView view, std::int64_t planes, std::int64_t first, std::int64_t last) {
  const std::int64_t rows = last - first;
  for (std::int64_t item = first_row(); item < planes * rows; item += row_step())
    for_each_place(view, first + item % rows,
                   [&](std::int64_t c) { round_row_of<T>(view, item / rows, c, first + item % rows); });
}

template <class T>
__global__ void append_quantised_kernel(AppendArgs a) {
  griddep_wait();
  const int groups = a.shape.groups;
  const std::int64_t rows = a.tile.rows() * groups;
  for (std::int64_t item = first_row(); item < 2 * rows; item += row_step()) {
    const KvView& view = item < rows ? a.k_cache : a.v_cache;
    const T* from = static_cast<const T*>(item < rows ? a.k : a.v) + item % rows * view.width;
    const std::int64_t r = item % rows / groups, g = item % groups;
    const TileRow row = tile_row(a.tile, r);
    if (!is_kept(view.map, a.tile, r % a.tile.tokens, row.t)) continue;
    const std::int64_t c = view.map.ring > 0 ? 0 : chunk_of(view.map, row.t);
    quantise_row(view, (a.tile.batch_begin + row.sequence) * groups + g, c, row.t,
                 [&](int e) { return to_float(from[e]); });
  }
}

/// Element e of a compressed token, the mean over its raw rows in the order of mean_of(), in storage type. Not inlined:
/// it is long, and called twice for a row.
template <class T>
__device__ __noinline__ float mean_at(const LayerShape& s, const KvView& raw, std::int64_t plane, std::int64_t i,
                                      int e) {
  const std::int64_t first = i * s.rules.d, c = chunk_of(raw.map, first);
  float sum = 0.0f;
#pragma unroll 8
  for (int m = 0; m < s.rules.l; ++m)
    sum += to_float(static_cast<const T*>(raw.data)[offset_in_chunk(raw, plane, c, first + m) + e]);
  return as_stored<T>(sum / s.rules.l);
}
/// The same of the 32 N elements that a warp holds. Rows of one chunk follow one another, in a ring up to its end.
template <class T, int N>
__device__ void hold_mean(const LayerShape& s, const KvView& raw, std::int64_t plane, std::int64_t i, float (&x)[N]) {
  const int lane = threadIdx.x % 32, l = s.rules.l, ring = static_cast<int>(raw.map.ring);
  const std::int64_t first = i * s.rules.d, c = chunk_of(raw.map, first);
  const T* rows = static_cast<const T*>(raw.data) + offset_in_chunk(raw, plane, c, first) + lane;
  const int before_end = ring > 0 ? ring - static_cast<int>(first % ring) : l;
#pragma unroll
  for (int k = 0; k < N; ++k) x[k] = 0.0f;
#pragma unroll 8
  for (int m = 0; m < l; ++m) {
    const T* row = rows + std::int64_t{m < before_end ? m : m - ring} * raw.width;
#pragma unroll
    for (int k = 0; k < N; ++k)
      if (k * 32 + lane < raw.width) x[k] += to_float(row[k * 32]);
  }
#pragma unroll
  for (int k = 0; k < N; ++k) x[k] = as_stored<T>(x[k] / l);
}
/// Stores compressed token i as a row of chunk c or of its halo.
template <class T>
__device__ void store_mean(const LayerShape& s, const KvView& raw, const KvView& view, std::int64_t plane,
                           std::int64_t c, std::int64_t i) {
  const auto hold = [&](auto values) {
    float x[values];
    hold_mean<T>(s, raw, plane, i, x);
    quantise_held_row(view, plane, c, i, x);
  };
  if (!raw.pages.pages && view.width <= 128) return hold(std::integral_constant<int, 4>{});
  if (!raw.pages.pages && view.width <= 256) return hold(std::integral_constant<int, 8>{});
  quantise_row(view, plane, c, i, [&](int e) { return mean_at<T>(s, raw, plane, i, e); });
}

template <class T>
__global__ void compress_quantised_kernel(CompressArgs a, std::int64_t max_tokens) {
  griddep_wait();
  const LayerShape& s = a.shape;
  const std::int64_t items = std::int64_t{a.tile.batches} * s.groups * max_tokens;
  for (std::int64_t item = first_row(); item < 2 * items; item += row_step()) {
    const KvView& view = item < items ? a.k_cmp : a.v_cmp;
    const KvView& raw = item < items ? a.k_raw : a.v_raw;
    const std::int64_t in_tile = item % items / max_tokens;
    const TokenRange tokens = completed(s, a.tile, in_tile / s.groups);
    const std::int64_t i = tokens.begin + item % max_tokens;
    if (i >= tokens.end || !is_wanted(view, a.fill_halo, i)) continue;
    const std::int64_t plane = std::int64_t{a.tile.batch_begin} * s.groups + in_tile;
    const RowMap& m = view.map;
    const std::int64_t own = chunk_of(m, i);
    if (has_chunk(m, own)) store_mean<T>(s, raw, view, plane, own, i);
    if (a.fill_halo && m.halo > 0 && m.rank != all_ranks && i >= (own + 1) * m.chunk - m.halo && has_chunk(m, own + 1))
      store_mean<T>(s, raw, view, plane, own + 1, i);
  }
}

/// Appends a row of the step at position t.
template <class T>
__device__ void append_row(const KvView& view, const QueryTile& tile, const T* from, std::int64_t plane,
                           std::int64_t t) {
  if (!is_kept(view.map, tile, 0, t)) return;
  const std::int64_t c = view.map.ring > 0 ? 0 : chunk_of(view.map, t);
  const int lane = threadIdx.x % 32;
  if (!is_quantised(view)) {
    T* to = static_cast<T*>(view.data) + offset_in_chunk(view, plane, c, t);
    for (int e = lane; e < view.width; e += 32) to[e] = from[e];
  } else if (view.width <= 256) {
    float x[8] = {};
#pragma unroll
    for (int k = 0; k < 8; ++k)
      if (k * 32 + lane < view.width) x[k] = to_float(from[k * 32 + lane]);
    quantise_held_row(view, plane, c, t, x);
  } else {
    quantise_row(view, plane, c, t, [&](int e) { return to_float(from[e]); });
  }
}

// A warp a branch, (row, group) and K or V: what it appends; of cmp then the compressed token that completes, whose
// last raw row it has just stored.
template <class T>
__global__ void quantised_prologue_kernel(const __grid_constant__ PrologueArgs a) {
  griddep_wait();
  const LayerShape& s = a.compress.shape;
  const QueryTile& tile = a.compress.tile;
  const std::int64_t rows = tile.rows() * s.groups;
  for (std::int64_t item = first_row(); item < branches * 2 * rows; item += row_step()) {
    const bool keys = item % (2 * rows) < rows;
    const auto branch = static_cast<int>(item / (2 * rows));
    const std::int64_t work_item = item % rows, r = work_item / s.groups,
                       plane = (tile.batch_begin + r) * s.groups + work_item % s.groups;
    const std::int64_t t = position_of_row(tile, r);
    const AppendArgs& append = a.append[branch];
    const KvView& cache = keys ? append.k_cache : append.v_cache;
    append_row(cache, tile, static_cast<const T*>(keys ? append.k : append.v) + work_item * cache.width, plane, t);
    if (branch != cmp) continue;
    __syncwarp();
    const KvView& view = keys ? a.compress.k_cmp : a.compress.v_cmp;
    const TokenRange tokens = completed(s, tile, r);
    if (tokens.begin < tokens.end)
      store_mean<T>(s, keys ? a.compress.k_raw : a.compress.v_raw, view, plane, chunk_of(view.map, tokens.begin),
                    tokens.begin);
  }
}

template <class T>
__global__ void copy_quantised_rows_kernel(CopyRowsArgs a, std::int64_t first_chunk, std::int64_t chunks,
                                           std::int64_t span) {
  const int width = a.dst.width;
  for (std::int64_t item = first_row(); item < a.planes * chunks * span; item += row_step()) {
    const std::int64_t k = item % span, c = first_chunk + item / span % chunks, p = item / span / chunks;
    if (a.dst.map.ring == 0 && !has_chunk(a.dst.map, c)) continue;
    const std::int64_t i = chunk_begin(a.dst.map, c) + a.span_begin + k;
    if (i < a.first || i >= a.last || !has_row(a.src.map, i)) continue;
    if (!has_page(a.src, p, chunk_of(a.src.map, i), i) || !writes_row(a.dst, p, c, i)) continue;
    const std::int64_t from = offset_of(a.src, p, i), to = offset_in_chunk(a.dst, p, c, i);
    if (!is_quantised(a.src)) {
      const T* values = static_cast<const T*>(a.src.data) + from;
      quantise_row(a.dst, p, c, i, [&](int e) { return to_float(values[e]); });
      continue;
    }
    const auto* values = static_cast<const std::uint8_t*>(a.src.data) + from;
    const std::uint8_t byte = a.src.scales[scale_of(a.src, p, i)];
    if (is_quantised(a.dst)) {
      for (int e = threadIdx.x % 32; e < width; e += 32) static_cast<std::uint8_t*>(a.dst.data)[to + e] = values[e];
      if (threadIdx.x % 32 == 0) a.dst.scales[scale_in_chunk(a.dst, p, c, i)] = byte;
    } else {
      for (int e = threadIdx.x % 32; e < width; e += 32)
        store(static_cast<T*>(a.dst.data) + to + e, e4m3_value(values[e]) * row_scale(byte));
    }
  }
}

template <class T>
__global__ void fill_quantised_rows_kernel(FillRowsArgs a, std::int64_t first) {
  const std::int64_t rows = a.last - first;
  for (std::int64_t item = first_row(); item < rows * a.batch * a.groups; item += row_step()) {
    const std::int64_t i = first + item % rows, p = item / rows;
    const std::uint64_t row = source_row(a.key, static_cast<std::uint64_t>(i), a.repeat);
    const auto value = [&](int e) {
      return as_stored<T>(
          a.scale * synthetic_value(a.key,
                                    static_cast<std::uint32_t>(i < a.shared_rows ? 0 : a.batch_begin + p / a.groups),
                                    row, static_cast<std::uint32_t>((a.group_begin + p % a.groups) * a.dst.width + e)));
    };
    for_each_place(a.dst, i, [&](std::int64_t c) { quantise_row(a.dst, p, c, i, value); });
  }
}

__global__ void checksum_scales_kernel(ChecksumArgs a) {
  const std::int64_t rows = a.last - a.first;
  std::uint64_t sum = 0;
  for (std::int64_t item = std::int64_t{blockIdx.x} * threads + threadIdx.x; item < a.planes * rows;
       item += std::int64_t{gridDim.x} * threads) {
    const std::int64_t p = item / rows, i = a.first + item % rows;
    if (has_row(a.view.map, i))
      sum += checksum_term(a.view.scales[scale_of(a.view, p, i)],
                           static_cast<std::uint64_t>((a.planes * a.view.width + p) * a.last + i));
  }
  atomicAdd(reinterpret_cast<unsigned long long*>(a.sum), static_cast<unsigned long long>(sum));
}

}  // namespace

void append_quantised(const AppendArgs& a, Stream* stream) {
  with_storage(a.shape.dtype, [&](auto type) {
    launch_pdl(append_quantised_kernel<decltype(type)>, blocks_for(2 * a.tile.rows() * a.shape.groups), threads, 0,
               stream, 1, a);
  });
}

void compress_quantised(const CompressArgs& a, Stream* stream) {
  if (a.shape.phi != PhiKind::mean) throw InternalError("compress: the learned form stores no FP8 rows");
  const std::int64_t max_tokens = (a.tile.tokens - 1) / a.shape.rules.d + 1,
                     items = a.tile.batches * std::int64_t{a.shape.groups} * max_tokens;
  with_storage(a.shape.dtype, [&](auto type) {
    launch_pdl(compress_quantised_kernel<decltype(type)>, blocks_for(2 * items), threads, 0, stream, 1, a, max_tokens);
  });
}

void quantised_prologue(const PrologueArgs& a, Stream* stream) {
  const LayerShape& s = a.compress.shape;
  with_storage(s.dtype, [&](auto type) {
    launch_pdl(quantised_prologue_kernel<decltype(type)>, blocks_for(branches * 2 * a.compress.tile.rows() * s.groups),
               threads, 0, stream, 1, a);
  });
}

void copy_quantised_rows(const CopyRowsArgs& a, std::int64_t first_chunk, std::int64_t chunks, std::int64_t span,
                         Stream* stream) {
  with_storage(a.dtype, [&](auto type) {
    copy_quantised_rows_kernel<decltype(type)>
        <<<blocks_for(a.planes * chunks * span), threads, 0, cuda(stream)>>>(a, first_chunk, chunks, span);
  });
  check_launch("copy_rows");
}

void fill_quantised_rows(const FillRowsArgs& a, Stream* stream) {
  const std::int64_t first = a.dst.map.ring > 0 ? std::max(a.first, a.last - a.dst.map.ring) : a.first;
  with_storage(a.dtype, [&](auto type) {
    fill_quantised_rows_kernel<decltype(type)>
        <<<blocks_for((a.last - first) * a.batch * a.groups), threads, 0, cuda(stream)>>>(a, first);
  });
  check_launch("fill_rows");
}

void checksum_scales(const ChecksumArgs& a, Stream* stream) {
  const auto blocks =
      std::clamp<std::int64_t>((a.planes * (a.last - a.first) + threads - 1) / threads, 1, limits().sms * 16);
  checksum_scales_kernel<<<static_cast<unsigned>(blocks), threads, 0, cuda(stream)>>>(a);
  check_launch("checksum");
}

void round_appended(const AppendArgs& a, Stream* stream) {
  const std::int64_t rows = a.tile.rows() * a.shape.groups;
  if (!a.k_cache.rounded || rows == 0) return;
  with_storage(a.shape.dtype, [&](auto type) {
    launch_pdl(round_appended_kernel<decltype(type)>, blocks_for(2 * rows), threads, 0, stream, 1, a.tile,
               a.shape.groups, a.k_cache, a.v_cache);
  });
}

void round_compressed(const CompressArgs& a, Stream* stream) {
  const std::int64_t max_tokens = (a.tile.tokens - 1) / a.shape.rules.d + 1,
                     items = a.tile.batches * std::int64_t{a.shape.groups} * max_tokens;
  if (!a.k_cmp.rounded || a.tile.tokens == 0 || items == 0) return;
  with_storage(a.shape.dtype, [&](auto type) {
    launch_pdl(round_compressed_kernel<decltype(type)>, blocks_for(2 * items), threads, 0, stream, 1, a, max_tokens);
  });
}

void round_rows(DType type, const KvView& view, std::int64_t planes, std::int64_t first, std::int64_t last,
                Stream* stream) {
  if (!view.rounded || last <= first || planes == 0) return;
  const std::int64_t begin = view.map.ring > 0 ? std::max(first, last - view.map.ring) : first;
  with_storage(type, [&](auto t) {
    round_rows_kernel<decltype(t)>
        <<<blocks_for(planes * (last - begin)), threads, 0, cuda(stream)>>>(view, planes, begin, last);
  });
  check_launch("round_rows");
}

}  // namespace nsa::gpu
