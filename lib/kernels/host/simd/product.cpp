// Register-blocked matrix product of tiles that lie in the first cache levels: a broadcast element of a times a
// vector of b. The vector width and the block are chosen by SIMD level; the sums are the same at all of them.

#include "kernels/host/simd/loops.hpp"

namespace nsa::host {
namespace {

template <int width>
struct VectorOf {
  // The compiler's own vectors: plain loops over accumulator arrays are spilled, these stay in registers.
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
  const float *keep, *add;  ///< null: c is overwritten
};

template <int width, int rows, int vectors>
[[gnu::always_inline]] inline void block(const Operands& p, int i0, int j0) {
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
      if (p.keep) {
        const V added = p.add[i0 + i] * sum[i][j];
        *out = p.keep[i0 + i] * *out + added;
      } else {
        *out = sum[i][j];
      }
    }
  }
}

template <int width, int rows, int vectors>
[[gnu::always_inline]] inline void columns(const Operands& p, int m, int j0) {
  int i = 0;
  for (; i + rows <= m; i += rows) block<width, rows, vectors>(p, i, j0);
  for (; i < m; ++i) block<width, 1, vectors>(p, i, j0);
}

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("arch=x86-64-v4"))) void run_v4(const Operands& p, int m, int n) {
  int j = 0;
  for (; j + 64 <= n; j += 64) columns<16, 4, 4>(p, m, j);
  for (; j < n; j += 16) columns<16, 8, 1>(p, m, j);
}

__attribute__((target("arch=x86-64-v3"))) void run_v3(const Operands& p, int m, int n) {
  for (int j = 0; j < n; j += 16) columns<8, 4, 2>(p, m, j);
}
#endif

void run_plain(const Operands& p, int m, int n) {
  for (int j = 0; j < n; j += 16) columns<4, 2, 4>(p, m, j);
}

using Run = void (*)(const Operands&, int, int);

Run choose() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("x86-64-v4")) return run_v4;
  if (__builtin_cpu_supports("x86-64-v3")) return run_v3;
#endif
  return run_plain;
}

const Run run = choose();

}  // namespace

void product(int m, int n, int inner, const float* a, std::ptrdiff_t a_row, std::ptrdiff_t a_inner, const float* b,
             std::ptrdiff_t ldb, float* c, std::ptrdiff_t ldc) {
  run({inner, a, a_row, a_inner, b, ldb, c, ldc, nullptr, nullptr}, m, n);
}

void product_merge(int m, int n, int inner, const float* a, std::ptrdiff_t a_row, std::ptrdiff_t a_inner,
                   const float* b, std::ptrdiff_t ldb, float* c, std::ptrdiff_t ldc, const float* keep,
                   const float* add) {
  run({inner, a, a_row, a_inner, b, ldb, c, ldc, keep, add}, m, n);
}

}  // namespace nsa::host
