#pragma once
// Rows of a cache from and to fp32, whatever the cache stores.

#include <cstdint>

#include "kernels/interface/kernel_table.hpp"

namespace nsa::host {

/// Rows of a cache that are contiguous in memory.
struct CachedRows {
  const void* data = nullptr;            ///< null: none
  const std::uint8_t* scales = nullptr;  ///< of a quantised cache: one a row; null: storage type
};

/// The rows of a view from row i of chunk c or of its halo on.
CachedRows cached_rows(DType type, const KvView& view, std::int64_t plane, std::int64_t c, std::int64_t i);
/// The same from row i in its own chunk on.
CachedRows cached_rows(DType type, const KvView& view, std::int64_t plane, std::int64_t i);
/// The rows from the n-th on, of `width` values each.
CachedRows advanced(DType type, const CachedRows& rows, std::int64_t n, std::int64_t width);
/// `count` rows of `width` values to fp32.
void load_rows(DType type, std::int64_t count, std::int64_t width, const CachedRows& rows, float* to);

/// Stores fp32 values as row i of chunk c or of its halo: in storage type, or quantised.
void store_row(DType type, const KvView& view, std::int64_t plane, std::int64_t c, std::int64_t i, const float* value);

}  // namespace nsa::host
