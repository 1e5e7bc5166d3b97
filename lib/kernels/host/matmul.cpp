// Few rows: bound by the weights' bytes, which are read once, in storage type. Many rows: panels of columns, one
// a thread, converted to fp32 once and multiplied by BLAS where there is one, else by our own tiles.

#include "kernels/host/matmul.hpp"

#include <algorithm>

#include "kernels/host/micro.hpp"

#ifdef NSA_HAVE_CBLAS
#include <cblas.h>
extern "C" void openblas_set_num_threads(int) __attribute__((weak));
#endif

namespace nsa::host {
namespace {

constexpr std::int64_t few_rows = 8;
constexpr std::int64_t strip = 512;  ///< columns of a thread's strip, few rows
constexpr std::int64_t panel = 128;  ///< columns of a panel, many rows
constexpr std::int64_t inner_block = 64;

void multiply_few(DType type, std::int64_t rows, std::int64_t inner, std::int64_t cols, const float* a, const void* w,
                  float* c) {
  const std::int64_t width = cols >= 4 * strip ? strip : panel;
#pragma omp parallel for schedule(dynamic)
  for (std::int64_t j = 0; j < cols; j += width) {
    const std::int64_t n = std::min(width, cols - j);
    for (std::int64_t r = 0; r < rows; ++r) std::fill_n(c + r * cols + j, n, 0.0f);
    for (std::int64_t k = 0; k < inner; k += inner_block) {  // a block of w stays in cache for all rows
      const std::int64_t depth = std::min(inner_block, inner - k);
      for (std::int64_t r = 0; r < rows; ++r)
        add_rows(type, n, depth, a + r * inner + k, at(type, w, k * cols + j), cols, c + r * cols + j);
    }
  }
}

/// c [rows, panel] = a b, b [inner, panel] fp32.
void multiply_panel(std::int64_t rows, std::int64_t inner, std::int64_t n, const float* a, const float* b, float* c,
                    float* padded) {
#ifdef NSA_HAVE_CBLAS
  static_cast<void>(padded);
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, static_cast<int>(rows), static_cast<int>(n),
              static_cast<int>(inner), 1.0f, a, static_cast<int>(inner), b, static_cast<int>(panel), 0.0f, c,
              static_cast<int>(panel));
#else
  static_cast<void>(n);
  // Blocks of `inner` that stay in the second cache level; keep and add sum them up.
  std::fill_n(padded, 2 * rows, 1.0f);
  std::fill_n(c, rows * panel, 0.0f);
  for (std::int64_t k = 0; k < inner; k += 4 * inner_block) {
    const int depth = static_cast<int>(std::min(4 * inner_block, inner - k));
    product_merge(static_cast<int>(rows), static_cast<int>(panel), depth, a + k, inner, 1, b + k * panel, panel, c,
                  panel, padded, padded + rows);
  }
#endif
}

void multiply_many(Arena arena, DType type, std::int64_t rows, std::int64_t inner, std::int64_t cols, const float* a,
                   const void* w, float* c) {
#ifdef NSA_HAVE_CBLAS
  if (openblas_set_num_threads) openblas_set_num_threads(1);  // the panels are spread over our own threads
#endif
  const std::int64_t size = inner * panel + matmul_rows * panel + 2 * matmul_rows;
  float* scratch = arena.take<float>(threads() * size);
#pragma omp parallel for schedule(dynamic)
  for (std::int64_t j = 0; j < cols; j += panel) {
    const std::int64_t n = std::min(panel, cols - j);
    float* b = scratch + omp_get_thread_num() * size;
    float* out = b + inner * panel;
    for (std::int64_t k = 0; k < inner; ++k) {
      load(type, n, at(type, w, k * cols + j), b + k * panel);
      std::fill(b + k * panel + n, b + (k + 1) * panel, 0.0f);
    }
    for (std::int64_t r = 0; r < rows; r += matmul_rows) {
      const std::int64_t m = std::min(matmul_rows, rows - r);
      multiply_panel(m, inner, n, a + r * inner, b, out, out + matmul_rows * panel);
      for (std::int64_t i = 0; i < m; ++i) std::copy_n(out + i * panel, n, c + (r + i) * cols + j);
    }
  }
}

}  // namespace

void matmul(Arena arena, DType type, std::int64_t rows, std::int64_t inner, std::int64_t cols, const float* a,
            const void* w, float* c) {
  if (rows < few_rows)
    multiply_few(type, rows, inner, cols, a, w, c);
  else
    multiply_many(arena, type, rows, inner, cols, a, w, c);
}

void matmul_scratch(Arena& arena, std::int64_t inner) {
  arena.take<float>(threads() * (inner * panel + matmul_rows * panel + 2 * matmul_rows));
}

}  // namespace nsa::host
