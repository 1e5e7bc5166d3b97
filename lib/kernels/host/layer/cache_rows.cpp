// Rows of caches: append, copy between maps, fill with synthetic values, checksum; and the end of a decode step. Every
// loop runs over rows (by plane and chunk) and streams each row once; bound by those bytes, fill_rows by Philox.

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/host/runtime/arena.hpp"
#include "kernels/host/runtime/stages.hpp"
#include "kernels/host/simd/cached_rows.hpp"
#include "kernels/host/simd/loops.hpp"
#include "kernels/shared/checksum.hpp"
#include "kernels/shared/random.hpp"

namespace nsa::host {
namespace {

/// Whether the buffer stores chunk c. A ring is replicated: every rank stores all of it.
bool stores_chunk(const RowMap& map, std::int64_t c) { return map.ring > 0 || has_chunk(map, c); }

/// a + b, where b may be INT64_MAX for "no end".
std::int64_t saturating_add(std::int64_t a, std::int64_t b) {
  return b > INT64_MAX - std::max<std::int64_t>(a, 0) ? INT64_MAX : a + b;
}

/// Chunks whose span [chunk_begin + span_begin, …) may start before row `last`.
std::int64_t chunks_before(const RowMap& map, std::int64_t last, std::int64_t span_begin) {
  if (last <= 0) return 0;
  const std::int64_t reach = saturating_add(last, std::max<std::int64_t>(0, -span_begin));
  return (reach - 1) / map.chunk + 1;
}

/// One thread's row in fp32.
float* row_values(std::int32_t width) {
  thread_local std::vector<float> values;
  values.resize(static_cast<std::size_t>(width));
  return values.data();
}

void append_rows(const AppendArgs& args, const void* rows, const KvView& cache) {
  const QueryTile& tile = args.tile;
  const LayerShape& s = args.shape;
  const std::int64_t first_kept = cache.map.ring > 0 ? tile.tokens - cache.map.ring : 0;  // of a sequence's rows
#pragma omp parallel for if (tile.rows() > 16)
  for (std::int64_t row = 0; row < tile.rows(); ++row) {
    const std::int64_t t = position_of_row(tile, row);
    if (row % tile.tokens < first_kept || !stores_chunk(cache.map, chunk_of(cache.map, t))) continue;
    for (std::int32_t g = 0; g < s.groups; ++g) {
      const std::int64_t plane = (tile.batch_begin + row / tile.tokens) * s.groups + g;
      if (!writes_row(cache, plane, chunk_of(cache.map, t), t)) continue;
      const void* from = at(s.dtype, rows, (row * s.groups + g) * cache.width);
      if (is_quantised(cache)) {
        float* values = row_values(cache.width);
        load(s.dtype, cache.width, from, values);
        store_row(s.dtype, cache, plane, chunk_of(cache.map, t), t, values);
      } else {
        std::memcpy(at(s.dtype, cache.data, offset_of(cache, plane, t)), from, cache.width * size_of(s.dtype));
      }
    }
  }
}

/// dst row (c, i) = src row i.
void copy_row(DType type, const KvView& src, const KvView& dst, std::int64_t plane, std::int64_t c, std::int64_t i) {
  const std::int64_t to = offset_in_chunk(dst, plane, c, i), from = offset_of(src, plane, i);
  if (is_quantised(src) != is_quantised(dst)) {
    float* values = row_values(src.width);
    load_rows(type, 1, src.width, cached_rows(type, src, plane, i), values);
    return store_row(type, dst, plane, c, i, values);
  }
  if (!is_quantised(src)) {
    std::memcpy(at(type, dst.data, to), at(type, src.data, from), src.width * size_of(type));
    return;
  }
  std::memcpy(static_cast<std::uint8_t*>(dst.data) + to, static_cast<const std::uint8_t*>(src.data) + from, src.width);
  dst.scales[scale_in_chunk(dst, plane, c, i)] = src.scales[scale_of(src, plane, i)];
}

}  // namespace

void append(const AppendArgs& args, Stream*) {
  append_rows(args, args.k, args.k_cache);
  append_rows(args, args.v, args.v_cache);
}

void copy_rows(const CopyRowsArgs& args, Stream*) {
  const KvView &src = args.src, &dst = args.dst;
  const std::int64_t first = dst.map.ring > 0 ? std::max(args.first, args.last - dst.map.ring) : args.first;
  const std::int64_t chunks = chunks_before(dst.map, args.last, args.span_begin);
#pragma omp parallel for collapse(2)
  for (std::int64_t plane = 0; plane < args.planes; ++plane) {
    for (std::int64_t c = 0; c < chunks; ++c) {
      if (!stores_chunk(dst.map, c)) continue;
      const std::int64_t begin = std::max(first, saturating_add(chunk_begin(dst.map, c), args.span_begin));
      const std::int64_t end = std::min(args.last, saturating_add(chunk_begin(dst.map, c), args.span_end));
      for (std::int64_t i = std::max<std::int64_t>(begin, 0); i < end; ++i) {
        if (!has_row(src.map, i) || !has_page(src, plane, chunk_of(src.map, i), i) || !writes_row(dst, plane, c, i))
          continue;
        copy_row(args.dtype, src, dst, plane, c, i);
      }
    }
  }
}

void fill_rows(const FillRowsArgs& args, Stream*) {
  const KvView& dst = args.dst;
  const RowMap& map = dst.map;
  const std::int64_t first = map.ring > 0 ? std::max(args.first, args.last - map.ring) : args.first;
  const std::int64_t stored_rows = map.stride == INT64_MAX ? INT64_MAX : map.stride - map.halo;
  const std::int64_t chunks = chunks_before(map, args.last, -map.halo);
#pragma omp parallel
  {
    std::vector<float> values(static_cast<std::size_t>(dst.width));
    for (std::int64_t plane = 0; plane < std::int64_t{args.batch} * args.groups; ++plane) {
      const std::int64_t b = args.batch_begin + plane / args.groups;
      const auto column0 = static_cast<std::uint32_t>((args.group_begin + plane % args.groups) * dst.width);
      for (std::int64_t c = 0; c < chunks; ++c) {
        if (!stores_chunk(map, c)) continue;
        const std::int64_t begin = std::max({first, chunk_begin(map, c) - map.halo, std::int64_t{0}});
        const std::int64_t end =
            map.ring > 0 ? args.last : std::min(args.last, saturating_add(chunk_begin(map, c), stored_rows));
#pragma omp for nowait
        for (std::int64_t i = begin; i < end; ++i) {
          if (!writes_row(dst, plane, c, i)) continue;
          const auto sequence = static_cast<std::uint32_t>(i < args.shared_rows ? 0 : b);
          const std::uint64_t row = source_row(args.key, static_cast<std::uint64_t>(i), args.repeat);
          synthetic_row(dst.width, args.key, sequence, row, column0, args.scale, values.data());
          store_row(args.dtype, dst, plane, c, i, values.data());
        }
      }
    }
  }
}

namespace {

/// Terms of the scales.
std::uint64_t checksum_of_scales(const ChecksumArgs& args) {
  const KvView& view = args.view;
  std::uint64_t sum = 0;
#pragma omp parallel for collapse(2) reduction(+ : sum)
  for (std::int64_t plane = 0; plane < args.planes; ++plane)
    for (std::int64_t i = args.first; i < args.last; ++i)
      if (has_row(view.map, i))
        sum += checksum_term(view.scales[scale_of(view, plane, i)],
                             static_cast<std::uint64_t>((args.planes * view.width + plane) * args.last + i));
  return sum;
}

template <class Bits>
std::uint64_t checksum_of(const ChecksumArgs& args) {
  const KvView& view = args.view;
  const auto* data = static_cast<const Bits*>(view.data);
  std::uint64_t sum = 0;
#pragma omp parallel for collapse(2) reduction(+ : sum)
  for (std::int64_t plane = 0; plane < args.planes; ++plane) {
    for (std::int64_t i = args.first; i < args.last; ++i) {
      if (!has_row(view.map, i)) continue;
      const Bits* row = data + offset_of(view, plane, i);
      const std::int64_t index = (plane * args.last + i) * view.width;
      for (std::int32_t e = 0; e < view.width; ++e) sum += checksum_term(row[e], static_cast<std::uint64_t>(index + e));
    }
  }
  return sum;
}

}  // namespace

void checksum(const ChecksumArgs& args, Stream*) {
  if (is_quantised(args.view)) {
    *args.sum += checksum_of<std::uint8_t>(args) + checksum_of_scales(args);
    return;
  }
  *args.sum += size_of(args.dtype) == 2 ? checksum_of<std::uint16_t>(args) : checksum_of<std::uint32_t>(args);
}

void advance(const AdvanceArgs& args, Stream*) {
  const std::int64_t step = *args.step;
  if (step < args.log_steps) {
    if (args.reads_log) std::copy_n(args.reads, args.counters, args.reads_log + step * args.counters);
    if (args.selected_log)
      std::copy_n(args.selected, args.selected_count, args.selected_log + step * args.selected_count);
  }
  std::fill_n(args.reads, args.counters, 0);
  *args.step = step + 1;
  for (std::int64_t i = 0; i < args.positions; ++i) args.position[i] += kept_tokens(args.acceptance, step, i);
}

}  // namespace nsa::host
