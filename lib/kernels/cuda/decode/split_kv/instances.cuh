#pragma once
// For which shapes the decode kernels are built.
//
// A tuned instance serves one pair of head sizes, which are constants of its code, with up to 16 query heads a group
// and 16 selected blocks in the fused step. A padded instance serves every pair of multiples of 16 up to its size: rows
// in memory have the shape's length, slots and registers the instance's. Columns past the head size are zeros up
// to the next 64, and nothing is multiplied past these. It takes up to 128 query heads a group, in head tiles, and 32
// selected blocks.

#include <algorithm>

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

struct DecodeInstance {
  int d_k = 0, d_v = 0;  ///< 0: no instance serves the shape
  int heads = 0;         ///< of a warp tile
  bool tuned = false;
  explicit operator bool() const { return d_k > 0; }
};

constexpr int padded_max_heads = 128;  ///< query heads of a group
constexpr int padded_max_blocks = 32;  ///< selected blocks of a fused step

inline bool is_tuned_size(const LayerShape& s) {
  if (s.dtype == DType::f32) return s.d_k == s.d_v && (s.d_k == 64 || s.d_k == 128);
  return (s.d_k == 64 && s.d_v == 64) || ((s.d_k == 128 || s.d_k == 192) && s.d_v == 128);
}
/// The padded instance whose warp tiles have `heads` heads.
inline DecodeInstance padded_instance(const LayerShape& s, int heads) {
  const int largest = std::max(s.d_k, s.d_v);
  if (s.dtype == DType::f32 || s.d_k % 16 != 0 || s.d_v % 16 != 0 || largest > 256) return {};
  if (largest <= 128) return {128, 128, heads, false};
  return {256, 256, 16, false};
}

/// Instance of the split-KV kernel.
inline DecodeInstance split_kv_instance(const LayerShape& s) {
  if (is_tuned_size(s)) return {s.d_k, s.d_v, decode_heads(s.dtype), true};
  return padded_instance(s, 16);
}

/// Heads of a group as the scratch of either kernel counts them: whole warp tiles.
__host__ __device__ inline int padded_heads(const LayerShape& s) {
  const int tile = s.dtype == DType::f32 ? 4 : s.heads_per_group > 16 ? 32 : 16;
  return (s.heads_per_group + tile - 1) / tile * tile;
}

}  // namespace nsa::gpu
