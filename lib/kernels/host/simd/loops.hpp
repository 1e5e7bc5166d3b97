#pragma once
// Leaf loops of the host stages, each compiled for several SIMD levels and chosen at run time, so that one
// binary runs on every node. Bit-identity: an element of a product or of an exponential is computed by the same
// operations in the same order wherever it stands in a tile; selection rests on it.

#include <cstddef>
#include <cstdint>

#include "kernels/shared/dtype.hpp"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)  // it cannot start under resolvers of its own making
#define NSA_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define NSA_SIMD
#endif

namespace nsa::host {

constexpr int lanes = 16;        ///< columns of a tile come in multiples of this
constexpr int tile_tokens = 64;  ///< K/V rows a tile holds at most

/// c [m, n] = a b over `inner`, a at a[i * a_row + k * a_inner], b [inner, ldb], n a multiple of `lanes`. Each
/// element is summed by rising k.
void product(int m, int n, int inner, const float* a, std::ptrdiff_t a_row, std::ptrdiff_t a_inner, const float* b,
             std::ptrdiff_t ldb, float* c, std::ptrdiff_t ldc);

/// c [m, n] = keep[i] * c + add[i] * (a b).
void product_merge(int m, int n, int inner, const float* a, std::ptrdiff_t a_row, std::ptrdiff_t a_inner,
                   const float* b, std::ptrdiff_t ldb, float* c, std::ptrdiff_t ldc, const float* keep,
                   const float* add);

/// Scores s [tokens, columns] -> exp(s - m) in place, with m and sum by column; columns a multiple of `lanes`.
/// A column whose scores are all -inf gets m = -inf, sum = 0 and zeros.
void softmax_columns(int tokens, int columns, float* s, float* m, float* sum);

/// s [tokens, columns] = -inf where the token is outside [first[column], last[column]).
void mask_columns(int tokens, int columns, float* s, const std::int32_t* first, const std::int32_t* last);

/// (m, s) and (m2, s2) -> their union in (m, s); keep and add scale the two unnormalised outputs.
void merge_columns(int columns, float* m, float* s, const float* m2, const float* s2, float* keep, float* add);

/// o = keep * o + add * o2
void merge_row(std::int64_t n, float keep, float* o, float add, const float* o2);

/// sum[i] += exp(s[i] - m) * inverse_z
void add_probabilities(int n, const float* s, float m, float inverse_z, float* sum);

/// y[i] += sum over the rows r of x[r] * w[r * ldw + i], by rising r, w in storage type.
void add_rows(DType type, std::int64_t n, std::int64_t rows, const float* x, const void* w, std::int64_t ldw, float* y);

/// out[i] = scale * synthetic_value(key, plane, row, column + i).
void synthetic_row(std::int64_t n, std::uint64_t key, std::uint32_t plane, std::uint64_t row, std::uint32_t column,
                   float scale, float* out);

void load(DType type, std::int64_t n, const void* from, float* to);
void store(DType type, std::int64_t n, const float* from, void* to);

/// The exponential all stages use: within 2 ulp for x <= 88, 0 below -87, NaN for NaN.
float exponential(float x);

/// `p` moved by `n` elements of storage type.
inline const void* at(DType type, const void* p, std::int64_t n) {
  return static_cast<const std::byte*>(p) + n * static_cast<std::int64_t>(size_of(type));
}
inline void* at(DType type, void* p, std::int64_t n) {
  return static_cast<std::byte*>(p) + n * static_cast<std::int64_t>(size_of(type));
}

}  // namespace nsa::host
