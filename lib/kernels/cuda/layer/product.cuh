#pragma once
// The matrix products around the attention.

#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

/// out [rows, columns] fp32 = x [rows, depth] * w [depth, columns], x and w in storage type, sums in fp32.
struct Product {
  DType type;
  std::int64_t rows;
  int depth;
  std::int64_t columns;
  const void* x;
  const void* w;
  float* out;
  const float* residual = nullptr;  ///< [rows, depth]: x is rmsnorm of it; only where normalises(), which reads no x
  float* sum = nullptr;             ///< [rows, columns]: += out
};
void product(const Product& p, Stream* stream);
/// Whether the product forms the rmsnorm of `residual` itself.
bool normalises(const Product& p);

}  // namespace nsa::gpu
