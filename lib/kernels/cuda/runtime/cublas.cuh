#pragma once
// Batched matrix products through cuBLAS, row-major.

#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

inline cudaDataType storage_type(DType type) {
  return type == DType::bf16 ? CUDA_R_16BF : type == DType::f16 ? CUDA_R_16F : CUDA_R_32F;
}

/// out [m, n] = alpha a [m, k] b, b [k, n] or, where `b_by_rows`, the transpose of b [n, k]. a and b in storage type,
/// out and sums fp32. `batch` such products are the given strides apart, in elements; stride 0: all share the operand.
struct Gemm {
  int batch = 1, m = 0, n = 0, k = 0;
  float alpha = 1.0f;
  const void* a = nullptr;
  std::int64_t a_ld = 0, a_stride = 0;
  const void* b = nullptr;
  std::int64_t b_ld = 0, b_stride = 0;
  bool b_by_rows = false;
  float* out = nullptr;
  std::int64_t out_ld = 0, out_stride = 0;
};

void multiply(DType type, const Gemm& gemm, Stream* stream);

/// The same for b_by_rows, with every element summed in one order that does not depend on m, n and batch: one
/// algorithm, chosen once for `typical_m` rows, without split-K. The order holds for n a multiple of four; other n may
/// use an algorithm that sums in another order. Rows of a and b are packed (k a multiple of their alignment).
void multiply_in_fixed_order(DType type, const Gemm& gemm, int typical_m, Stream* stream);

}  // namespace nsa::gpu
