#pragma once
// Tensor-core products of 16-bit operands, mma.m16n8k16 with fp32 accumulation, and register layouts in which K and V
// go from memory into operands without a shuffle.
//
// Lane = 4 * g + t. A [16 x 16]: rows g and g + 8; C [16 x 8]: c0 c1 = row g, columns 2t 2t+1; c2 c3 = row g + 8.
//
// q k^T: the sum over dimensions may take any order that is the same in both operands. Lane t loads the 8 consecutive
// elements 8t .. 8t+7 of every 32 of a row, one 16-byte load, for two products.
// p v: a lane loads 8 consecutive columns of its tokens 2t, 2t+1, 2t+8, 2t+9. Columns 8g + j of every 64 are those of
// product j, so a lane has 16 consecutive columns of o. The layout of p after q k^T is the one that p v reads.

#include <cstdint>

#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

__device__ __forceinline__ void mma(float (&c)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2,
                                    std::uint32_t a3, std::uint32_t b0, std::uint32_t b1, __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(float (&c)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2,
                                    std::uint32_t a3, std::uint32_t b0, std::uint32_t b1, __half) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ std::uint32_t pack(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&both);
}
__device__ __forceinline__ std::uint32_t pack(float low, float high, __half) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&both);
}

/// 16 bytes that are read once.
__device__ __forceinline__ uint4 load_no_allocate(const void* from) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

/// Operand A of q k^T, in shared memory so that it takes no registers between products: [Dk / 16][lane] in the
/// product's layout, written once for all warps.
template <int DK>
struct QueryFragments {
  uint4* words;
  static constexpr int bytes = DK / 16 * 32 * sizeof(uint4);
  /// Row r of `from` is head r; those past `heads` are zero.
  template <class T>
  __device__ __forceinline__ void fill(const T* from, int heads, int thread, int threads) const {
    for (int item = thread; item < DK / 16 * 32; item += threads) {
      const int lane = item % 32, g = lane / 4, column = item / 64 * 32 + lane % 4 * 8 + item / 32 % 2 * 4;
      const uint2 low = g < heads ? *reinterpret_cast<const uint2*>(from + g * DK + column) : uint2{};
      const uint2 high = g + 8 < heads ? *reinterpret_cast<const uint2*>(from + (g + 8) * DK + column) : uint2{};
      words[item] = {low.x, high.x, low.y, high.y};
    }
  }
  // Volatile: the compiler would keep all of it in registers for the whole loop.
  __device__ __forceinline__ uint4 operator()(int step) const {
    uint4 v;
    const unsigned at = shared_address(words + step * 32 + threadIdx.x % 32);
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
    return v;
  }
};

/// Operand B of q k^T: 16 tokens, `first` = token g, `second` = token g + 8.
template <int DK>
struct KeyFragments {
  uint4 first[DK / 32], second[DK / 32];
};

/// Operand B of p v for 64 columns: tokens 2t, 2t+1, 2t+8, 2t+9, columns 8g .. 8g+7.
struct ValueFragments {
  uint4 row[4];
};

/// Operand A of p v: the probabilities of 16 tokens in the layout of q k^T.
template <class T>
struct ProbabilityFragments {
  std::uint32_t a[4];
  __device__ __forceinline__ explicit ProbabilityFragments(const float (&p)[2][4])
      : a{pack(p[0][0], p[0][1], T{}), pack(p[0][2], p[0][3], T{}), pack(p[1][0], p[1][1], T{}),
          pack(p[1][2], p[1][3], T{})} {}
};

/// c[0]: tokens 0..7, c[1]: tokens 8..15, from zero.
template <class T, int DK>
__device__ __forceinline__ void multiply_qk(float (&c)[2][4], const QueryFragments<DK>& q, const KeyFragments<DK>& k) {
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n][i] = 0.0f;
#pragma unroll
  for (int j = 0; j < DK / 32; ++j) {
    const uint4 even = q(2 * j), odd = q(2 * j + 1);
    mma(c[0], even.x, even.y, even.z, even.w, k.first[j].x, k.first[j].y, T{});
    mma(c[1], even.x, even.y, even.z, even.w, k.second[j].x, k.second[j].y, T{});
    mma(c[0], odd.x, odd.y, odd.z, odd.w, k.first[j].z, k.first[j].w, T{});
    mma(c[1], odd.x, odd.y, odd.z, odd.w, k.second[j].z, k.second[j].w, T{});
  }
}

/// o += p v for 64 columns; o[j]: columns 16t + j of row g (then 16t + 8 + j), and of row g + 8.
template <class T>
__device__ __forceinline__ void accumulate_pv(float (&o)[8][4], const ProbabilityFragments<T>& p,
                                              const ValueFragments& v) {
  const std::uint32_t w[4][4] = {{v.row[0].x, v.row[0].y, v.row[0].z, v.row[0].w},
                                 {v.row[1].x, v.row[1].y, v.row[1].z, v.row[1].w},
                                 {v.row[2].x, v.row[2].y, v.row[2].z, v.row[2].w},
                                 {v.row[3].x, v.row[3].y, v.row[3].z, v.row[3].w}};
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    mma(o[2 * pair], p.a[0], p.a[1], p.a[2], p.a[3], __byte_perm(w[0][pair], w[1][pair], 0x5410),
        __byte_perm(w[2][pair], w[3][pair], 0x5410), T{});
    mma(o[2 * pair + 1], p.a[0], p.a[1], p.a[2], p.a[3], __byte_perm(w[0][pair], w[1][pair], 0x7632),
        __byte_perm(w[2][pair], w[3][pair], 0x7632), T{});
  }
}

/// Four 8 x 8 matrices of 16-bit elements from shared memory; lanes 8i .. 8i + 7 pass the addresses of the i-th's rows.
/// The second function transposes each matrix.
__device__ __forceinline__ void ldmatrix_x4(std::uint32_t (&r)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(std::uint32_t (&r)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

/// Maximum and sum over the four lanes that share a row.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

}  // namespace nsa::gpu
