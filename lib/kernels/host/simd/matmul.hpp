#pragma once
// Matrix products with weights in storage type.

#include <cstddef>
#include <cstdint>

#include "kernels/host/runtime/arena.hpp"
#include "kernels/shared/dtype.hpp"

namespace nsa::host {

/// Rows the stages pass to matmul at a time: enough to amortise the conversion of the weights.
constexpr std::int64_t matmul_rows = 256;

/// c [rows, cols] = a [rows, inner] w [inner, cols]; a and c fp32, w storage type. Allocates scratch from the
/// arena; call it outside of parallel regions. The result does not depend on the thread count.
void matmul(Arena arena, DType type, std::int64_t rows, std::int64_t inner, std::int64_t cols, const float* a,
            const void* w, float* c);

/// Adds the scratch of matmul to the arena.
void matmul_scratch(Arena& arena);

}  // namespace nsa::host
