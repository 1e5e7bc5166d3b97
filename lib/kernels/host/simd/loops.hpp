#pragma once
// Inner loops of the host stages, each compiled for several SIMD levels and dispatched at run time, so that one binary
// runs on every node. Bit-identity: an element of a product or of an exponential is computed by the same operations in
// the same order at every position in a tile. Selection depends on it.

#include <cstddef>
#include <cstdint>
#include <limits>

#include "kernels/shared/dtype.hpp"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)  // their ifunc resolvers would run before the sanitizer starts
#define NSA_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define NSA_SIMD
#endif

namespace nsa::host {

constexpr int simd_lanes = 16;  ///< query columns of a tile are a multiple of it
constexpr float neg_inf = -std::numeric_limits<float>::infinity();
constexpr int kv_tile_tokens = 64;  ///< K/V rows of a KV tile at most

/// c [m, n] = a b over `inner`, a at a[i * a_row + k * a_inner], b [inner, ldb], n a multiple of `simd_lanes`. Each
/// element is summed by rising k.
void product(int m, int n, int inner, const float* a, std::ptrdiff_t a_row, std::ptrdiff_t a_inner, const float* b,
             std::ptrdiff_t ldb, float* c, std::ptrdiff_t ldc);

/// c [m, n] = scale_prev[i] * c + scale_new[i] * (a b).
void product_rescale_add(int m, int n, int inner, const float* a, std::ptrdiff_t a_row, std::ptrdiff_t a_inner,
                         const float* b, std::ptrdiff_t ldb, float* c, std::ptrdiff_t ldc, const float* scale_prev,
                         const float* scale_new);

/// to [columns, rows] = from [rows, columns] transposed, rows of both `from_row` and `to_row` apart.
void transpose(int rows, int columns, const float* from, std::ptrdiff_t from_row, float* to, std::ptrdiff_t to_row);

/// Scores s [tokens, columns] -> exp(s - m) in place, with m and sum by column; columns a multiple of `simd_lanes`.
/// A column whose scores are all -inf gets m = -inf, sum = 0 and zeros.
void softmax_columns(int tokens, int columns, float* s, float* m, float* sum);

/// s [tokens, columns] = -inf where the token is outside [first[column], last[column]).
void mask_columns(int tokens, int columns, float* s, const std::int32_t* first, const std::int32_t* last);

/// Merges the softmax states (m, s) and (m2, s2) of every column into (m, s). scale_prev and scale_new are the rescale
/// factors of the two unnormalised outputs.
void merge_softmax_columns(int columns, float* m, float* s, const float* m2, const float* s2, float* scale_prev,
                           float* scale_new);

/// o [n] = scale_prev * o + scale_new * o2.
void rescale_and_add(std::int64_t n, float scale_prev, float* o, float scale_new, const float* o2);

/// sum[i] += exp(s[i] - m) * inverse_z, n values.
void add_probabilities(int n, const float* s, float m, float inverse_z, float* sum);

/// y[i] += sum over the rows r of x[r] * w[r * ldw + i], by rising r, w in storage type.
void add_rows(DType type, std::int64_t n, std::int64_t rows, const float* x, const void* w, std::int64_t ldw, float* y);

/// out[i] = scale * synthetic_value(key, plane, row, column + i).
void synthetic_row(std::int64_t n, std::uint64_t key, std::uint32_t plane, std::uint64_t row, std::uint32_t column,
                   float scale, float* out);

/// n values from and to storage type.
void load(DType type, std::int64_t n, const void* from, float* to);
void store(DType type, std::int64_t n, const float* from, void* to);

/// `count` rows [width] of a quantised cache, with a scale each, to fp32.
void load_quantised(std::int64_t count, std::int64_t width, const void* from, const std::uint8_t* scales, float* to);
/// A row of n values to E4M3; returns its scale (shared/e4m3.hpp).
std::uint8_t store_quantised(std::int64_t n, const float* from, void* to);

/// The exponential of all stages: within 2 ulp for x <= 88, 0 below -87, NaN for NaN.
float exponential(float x);

/// `p` moved by `n` elements of storage type.
inline const void* at(DType type, const void* p, std::int64_t n) {
  return static_cast<const std::byte*>(p) + n * static_cast<std::int64_t>(size_of(type));
}
inline void* at(DType type, void* p, std::int64_t n) {
  return static_cast<std::byte*>(p) + n * static_cast<std::int64_t>(size_of(type));
}

}  // namespace nsa::host
