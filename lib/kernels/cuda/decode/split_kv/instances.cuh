#pragma once
// The head sizes of an instance of the decode kernels; sizes/work.hpp says which instance serves a shape.

#include "kernels/cuda/attention/split_kv.cuh"

namespace nsa::gpu {

/// Head sizes of a warp tile: constants of a tuned instance.
template <int DK, int DV, bool Tuned>
struct HeadSize {
  static constexpr int d_k = DK, d_v = DV;
  __host__ __device__ constexpr explicit HeadSize(const LayerShape&) {}
};
template <int DK, int DV>
struct HeadSize<DK, DV, false> {
  int d_k, d_v;
  __host__ __device__ constexpr explicit HeadSize(const LayerShape& s) : d_k(s.d_k), d_v(s.d_v) {}
};

}  // namespace nsa::gpu
