#include "kernels/host/simd/cached_rows.hpp"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "kernels/host/simd/loops.hpp"

namespace nsa::host {
namespace {

constexpr std::int32_t quantised_part = 256;  ///< values that are rounded to storage type at a time

}  // namespace

CachedRows cached_rows(DType type, const KvView& view, std::int64_t plane, std::int64_t c, std::int64_t i) {
  const std::int64_t offset = offset_in_chunk(view, plane, c, i);
  if (is_quantised(view))
    return {static_cast<const std::uint8_t*>(view.data) + offset, view.scales + scale_in_chunk(view, plane, c, i)};
  return {at(type, view.data, offset)};
}

CachedRows cached_rows(DType type, const KvView& view, std::int64_t plane, std::int64_t i) {
  return cached_rows(type, view, plane, chunk_of(view.map, i), i);
}

CachedRows advanced(DType type, const CachedRows& rows, std::int64_t n, std::int64_t width) {
  if (rows.scales) return {static_cast<const std::uint8_t*>(rows.data) + n * width, rows.scales + n};
  return {at(type, rows.data, n * width)};
}

void load_rows(DType type, std::int64_t count, std::int64_t width, const CachedRows& rows, float* to) {
  if (rows.scales) return load_quantised(count, width, rows.data, rows.scales, to);
  load(type, count * width, rows.data, to);
}

void store_row(DType type, const KvView& view, std::int64_t plane, std::int64_t c, std::int64_t i, const float* value) {
  const std::int64_t offset = offset_in_chunk(view, plane, c, i);
  if (!is_quantised(view)) return store(type, view.width, value, at(type, view.data, offset));
  std::byte stored[quantised_part * sizeof(float)];
  thread_local std::vector<float> row;  // rounded to storage type: what an unquantised cache would hold
  row.resize(static_cast<std::size_t>(view.width));
  for (std::int32_t e = 0; e < view.width; e += quantised_part) {
    const std::int32_t n = std::min(quantised_part, view.width - e);
    store(type, n, value + e, stored);
    load(type, n, stored, row.data() + e);
  }
  view.scales[scale_in_chunk(view, plane, c, i)] =
      store_quantised(view.width, row.data(), static_cast<std::uint8_t*>(view.data) + offset);
}

}  // namespace nsa::host
