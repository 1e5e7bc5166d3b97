// Register-blocked matrix product of tiles that are in L1 or L2: a broadcast element of a times a vector of b.
//
// Tiling by SIMD level: v4 4 rows x 64 columns (8 x 32 and 8 x 16 in the remainder), v3 4 x 16, else 2 x 16. The sums
// are the same at all levels. Bound by fused multiply-adds; a single row of 16 columns by their latency.

#include "kernels/host/runtime/x86_level.hpp"
#include "kernels/host/simd/loops.hpp"

namespace nsa::host {
namespace {

template <int width>
struct VectorOf {
  // Compiler vector types: accumulator arrays of plain floats are spilled, these stay in registers.
  typedef float type __attribute__((vector_size(width * 4), aligned(4), may_alias));
};

struct Operands {
  int inner;
  const float* a;
  std::ptrdiff_t a_row, a_inner;
  const float* b;
  std::ptrdiff_t ldb;
  float* c;
  std::ptrdiff_t ldc;
  const float *scale_prev, *scale_new;  ///< null: c is overwritten
};

template <int width, int rows, int vectors>
[[gnu::always_inline]] inline void multiply_block(const Operands& p, int i0, int j0) {
  using V = typename VectorOf<width>::type;
  const float* a = p.a + i0 * p.a_row;
  const float* b = p.b + j0;
  V sum[rows][vectors] = {};
  for (int k = 0; k < p.inner; ++k) {
    V column[vectors];
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) column[j] = *reinterpret_cast<const V*>(b + k * p.ldb + width * j);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const float x = a[i * p.a_row + k * p.a_inner];
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) sum[i][j] += x * column[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
    float* c = p.c + (i0 + i) * p.ldc + j0;
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) {
      V* out = reinterpret_cast<V*>(c + width * j);
      if (p.scale_prev) {
        const V added = p.scale_new[i0 + i] * sum[i][j];
        *out = p.scale_prev[i0 + i] * *out + added;
      } else {
        *out = sum[i][j];
      }
    }
  }
}

template <int width, int rows, int vectors>
[[gnu::always_inline]] inline void multiply_columns(const Operands& p, int m, int j0) {
  int i = 0;
  for (; i + rows <= m; i += rows) multiply_block<width, rows, vectors>(p, i, j0);
  if constexpr (rows > 4)
    for (; i + 4 <= m; i += 4) multiply_block<width, 4, vectors>(p, i, j0);
  for (; i < m; ++i) multiply_block<width, 1, vectors>(p, i, j0);
}

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("arch=x86-64-v4"))) void product_v4(const Operands& p, int m, int n) {
  int j = 0;
  for (; j + 64 <= n; j += 64) multiply_columns<16, 4, 4>(p, m, j);
  for (; j + 32 <= n; j += 32) multiply_columns<16, 8, 2>(p, m, j);
  if (j < n) multiply_columns<16, 8, 1>(p, m, j);
}

__attribute__((target("arch=x86-64-v3"))) void product_v3(const Operands& p, int m, int n) {
  for (int j = 0; j < n; j += 16) multiply_columns<8, 4, 2>(p, m, j);
}
#endif

void product_generic(const Operands& p, int m, int n) {
  for (int j = 0; j < n; j += 16) multiply_columns<4, 2, 4>(p, m, j);
}

using ProductFunction = void (*)(const Operands&, int, int);

ProductFunction best_function() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (x86_level() == 4) return product_v4;
  if (x86_level() == 3) return product_v3;
#endif
  return product_generic;
}

const ProductFunction product_function = best_function();

}  // namespace

void product(int m, int n, int inner, const float* a, std::ptrdiff_t a_row, std::ptrdiff_t a_inner, const float* b,
             std::ptrdiff_t ldb, float* c, std::ptrdiff_t ldc) {
  product_function({inner, a, a_row, a_inner, b, ldb, c, ldc, nullptr, nullptr}, m, n);
}

void product_rescale_add(int m, int n, int inner, const float* a, std::ptrdiff_t a_row, std::ptrdiff_t a_inner,
                         const float* b, std::ptrdiff_t ldb, float* c, std::ptrdiff_t ldc, const float* scale_prev,
                         const float* scale_new) {
  product_function({inner, a, a_row, a_inner, b, ldb, c, ldc, scale_prev, scale_new}, m, n);
}

}  // namespace nsa::host
