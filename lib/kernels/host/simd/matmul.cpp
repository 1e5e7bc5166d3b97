// Matrix products with weights in storage type.
//
// Tiling: one panel of columns a thread (512, or 128 of a narrow matrix). One row: the panel's weights are read once,
// in storage type; bound by those bytes. More rows: blocks of 128 weight rows, which stay in L2, are converted to fp32
// and multiplied by BLAS where it was found and rows are at least 16, else by product(); bound by the products. Panels
// are wide because a narrow strip of a wide matrix is read at a fraction of the memory rate.

#include "kernels/host/simd/matmul.hpp"

#include <algorithm>
#include <vector>

#include "kernels/host/simd/loops.hpp"

#ifdef NSA_HAVE_CBLAS
#include <cblas.h>
extern "C" void openblas_set_num_threads(int) __attribute__((weak));
#endif

namespace nsa::host {
namespace {

constexpr std::int64_t min_blas_rows = 16;   ///< with fewer rows BLAS loses more by packing than it gains
constexpr std::int64_t panel_columns = 512;  ///< columns of a panel
constexpr std::int64_t block_rows = 128;     ///< weight rows converted at a time

/// Narrower panels where full ones are too few for the threads. Does not depend on the number of threads.
std::int64_t panel_width(std::int64_t cols) { return cols >= 16 * panel_columns ? panel_columns : panel_columns / 4; }

void multiply_row(DType type, std::int64_t inner, std::int64_t cols, const float* a, const void* w, float* c) {
  const std::int64_t width = panel_width(cols);
#pragma omp parallel for schedule(dynamic)
  for (std::int64_t j = 0; j < cols; j += width) {
    const std::int64_t n = std::min(width, cols - j);
    std::fill_n(c + j, n, 0.0f);
    add_rows(type, n, inner, a, at(type, w, j), cols, c + j);
  }
}

struct PanelBuffers {
  PanelBuffers(Arena& arena, std::int64_t width)
      : b(arena.allocate<float>(block_rows * width)),
        c(arena.allocate<float>(matmul_rows * width)),
        ones(arena.allocate<float>(matmul_rows)) {}
  float *b, *c, *ones;  ///< [block_rows][width], [rows][width], [rows]
};

/// c [rows, width] += a b over `inner` values.
void multiply_block(std::int64_t rows, std::int64_t width, std::int64_t inner, const float* a, std::int64_t lda,
                    const PanelBuffers& buffers) {
#ifdef NSA_HAVE_CBLAS
  if (rows >= min_blas_rows)
    return cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, static_cast<int>(rows), static_cast<int>(width),
                       static_cast<int>(inner), 1.0f, a, static_cast<int>(lda), buffers.b, static_cast<int>(width),
                       1.0f, buffers.c, static_cast<int>(width));
#endif
  product_rescale_add(static_cast<int>(rows), static_cast<int>(width), static_cast<int>(inner), a, lda, 1, buffers.b,
                      width, buffers.c, width, buffers.ones, buffers.ones);
}

void multiply_panel(DType type, std::int64_t rows, std::int64_t inner, std::int64_t cols, std::int64_t j,
                    const float* a, const void* w, float* c, const PanelBuffers& buffers) {
  const std::int64_t width = panel_width(cols), n = std::min(width, cols - j);
  std::fill_n(buffers.c, rows * width, 0.0f);
  std::fill_n(buffers.ones, rows, 1.0f);
  for (std::int64_t k = 0; k < inner; k += block_rows) {
    const std::int64_t m = std::min(block_rows, inner - k);
    for (std::int64_t i = 0; i < m; ++i) {
      load(type, n, at(type, w, (k + i) * cols + j), buffers.b + i * width);
      std::fill(buffers.b + i * width + n, buffers.b + (i + 1) * width, 0.0f);
    }
    multiply_block(rows, width, m, a + k, inner, buffers);
  }
  for (std::int64_t r = 0; r < rows; ++r) std::copy_n(buffers.c + r * width, n, c + r * cols + j);
}

}  // namespace

void matmul(Arena arena, DType type, std::int64_t rows, std::int64_t inner, std::int64_t cols, const float* a,
            const void* w, float* c) {
  if (rows == 1) return multiply_row(type, inner, cols, a, w, c);
#ifdef NSA_HAVE_CBLAS
  if (openblas_set_num_threads) openblas_set_num_threads(1);  // the panels run on OpenMP threads
#endif
  std::vector<PanelBuffers> buffers;
  for (int t = 0; t < threads(); ++t) buffers.emplace_back(arena, panel_columns);
#pragma omp parallel for schedule(dynamic)
  for (std::int64_t j = 0; j < cols; j += panel_width(cols)) {
    for (std::int64_t r = 0; r < rows; r += matmul_rows)
      multiply_panel(type, std::min(matmul_rows, rows - r), inner, cols, j, a + r * inner, w, c + r * cols,
                     buffers[omp_get_thread_num()]);
  }
}

void matmul_scratch(Arena& arena) {
  for (int t = 0; t < threads(); ++t) PanelBuffers(arena, panel_columns);
}

}  // namespace nsa::host
