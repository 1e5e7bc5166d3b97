#pragma once
// Warp tile for E4M3 rows with a power of two a row (shared/e4m3.hpp): tensor cores in fp16, which holds every E4M3
// value, up to 16 heads. decode/split_kv/warp_tile.cuh describes the operations.
//
// A lane gets four neighbouring values of a row where 16-bit storage has two. For Q K^T the 16 columns of a product are
// in another order than in memory, in Q and in K: the sum of a product of 16 has the same bits. For P V the even and
// the odd columns of 16 are two products, so that a lane has four neighbouring columns of o. Q is scaled by a power of
// two a head into the range of fp16. The scale of a row of K multiplies its scores; that of a row of V multiplies its
// P, relative to the largest scale so far, which o is relative to. All of these are exact, but that P is rounded to
// fp16: scores have the bits that 16-bit storage of the same values gives.

#include "kernels/cuda/decode/split_kv/warp_tile_mma.cuh"
#include "kernels/cuda/primitives/e4m3.cuh"

namespace nsa::gpu {

template <class T, int DK, int DV>
struct WarpTileFp8 : WarpTileMma<T, DK, DV> {
  using Base = WarpTileMma<T, DK, DV>;
  using Base::c;
  using Base::o;
  using Base::q;
  static constexpr int element_bytes = 1, k_bytes = DK, v_bytes = DV;
  static constexpr int query_bytes = Base::query_bytes + Base::heads * 4;
  static_assert(DK == 128 && DV == 128, "a row is 128 bytes");

  float q_scale[2];         // of the scores of heads g and g + 8
  std::uint32_t scales[2];  // of the rows of K, then of V, 4 quad + j; + 16
  int reference = 0;        // o is relative to 2^(reference - 127)
  int rows = tile_rows;     // of this tile

  /// Queries of 16-bit storage, which all threads have stored, to fp16 in place. Threads are whole warps; the caller
  /// waits for all of them before and after.
  static __device__ __forceinline__ void convert_queries(char* queries, int thread, int threads) {
    constexpr int groups = DK / 16;  // of 16 columns
    for (int item = thread; item < Base::heads * groups; item += threads) {
      const int head = item / groups, first = head * (DK / 8) + item % groups * 2;
      auto* low = reinterpret_cast<uint4*>(queries + QueryRows<DK * 2>::offset(first));
      auto* high = reinterpret_cast<uint4*>(queries + QueryRows<DK * 2>::offset(first + 1));
      const uint4 vectors[2] = {*low, *high};
      const T* x = reinterpret_cast<const T*>(vectors);
      std::uint32_t largest = 0;
#pragma unroll
      for (int i = 0; i < 16; ++i) largest = max(largest, magnitude_bits(to_float(x[i])));
#pragma unroll
      for (int lanes = 1; lanes < groups; lanes *= 2)
        largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
      // The largest has the exponent 14: 2^15 is below the largest fp16.
      const int exponent = min(127, max(-126, largest == 0 ? 0 : 14 + 127 - static_cast<int>(largest >> 23)));
      const float factor = float_of_bits(static_cast<std::uint32_t>(127 + exponent) << 23);
      std::uint32_t pairs[8];
#pragma unroll
      for (int i = 0; i < 8; ++i)
        pairs[i] = pack(to_float(x[2 * i]) * factor, to_float(x[2 * i + 1]) * factor, __half{});
      *low = {pairs[0], pairs[2], pairs[4], pairs[6]};
      *high = {pairs[1], pairs[3], pairs[5], pairs[7]};
      if (item % groups == 0)
        reinterpret_cast<float*>(queries + Base::query_bytes)[head] =
            float_of_bits(static_cast<std::uint32_t>(127 - exponent) << 23);
    }
  }

  __device__ __forceinline__ WarpTileFp8(char* queries, char* prob, const LayerShape& s) : Base(queries, prob, s) {
    const float* scales = reinterpret_cast<const float*>(queries + Base::query_bytes) + threadIdx.x % 32 / 4;
    q_scale[0] = Base::softmax_scale * scales[0], q_scale[1] = Base::softmax_scale * scales[8];
  }

  __device__ __forceinline__ void multiply_qk(unsigned slot, int = 0) {
    const int lane = threadIdx.x % 32, block = block_of_column(lane % 8), vec = lane / 8;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[0][j][i] = 0.0f;
#pragma unroll
    for (int part = 0; part < DK / 64; ++part) {
      uint4 a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = q(0, (part * 4 + i) * 32 + lane);
      const unsigned at = slot + block * 4 * k_bytes + ((part * 4 + vec) ^ block) * 16;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        std::uint32_t b[4];
        ldmatrix_x4(b, at + j * k_bytes);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const HalfPairs k = halves_of(b[i]);
          mma(c[0][j], a[i].x, a[i].y, a[i].z, a[i].w, k.low, k.high, __half{});
        }
      }
    }
  }

  __device__ __forceinline__ void scale_scores() {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[0][j][i] = __fmul_rn(c[0][j][i], q_scale[i / 2] * scale_of_byte(scales[i % 2], j));
  }

  __device__ __forceinline__ void online_softmax(int tokens, const BlockSumOutput& sums = {}) {
    rows = tokens;
    Base::online_softmax(tokens, sums);
  }

  /// Loads the scales of a slot's rows, at shared address `at`.
  __device__ __forceinline__ void load_scales(unsigned at) {
    asm volatile("ld.shared.u32 %0, [%2];\nld.shared.u32 %1, [%2 + 16];"
                 : "=r"(scales[0]), "=r"(scales[1])
                 : "r"(at + threadIdx.x % 4 * 4)
                 : "memory");
  }
  /// Loads the scales of rows of V and brings o to the largest of them, where that is larger than those before. A NaN
  /// row, whose scale is the largest, makes all of o NaN. Rows past the last token count for nothing.
  __device__ __forceinline__ void raise_reference(unsigned at) {
    load_scales(at);
    if (rows < tile_rows) {
#pragma unroll
      for (int i = 0; i < 2; ++i) scales[i] &= bytes_of_tokens(i);
    }
    const int lane = threadIdx.x % 32;
    int own;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(own) : "r"(at + lane) : "memory");
    if (lane >= rows) own = 0;
    if (!__any_sync(0xffffffffu, own > reference)) return;
    const int largest = __reduce_max_sync(0xffffffffu, own);
    const float factor = float_of_bits(static_cast<std::uint32_t>(max(0, 127 + reference - largest)) << 23);
    reference = largest;
#pragma unroll
    for (int j = 0; j < DV / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) o[0][j][i] *= factor;
  }

  template <int Panel = 0>
  __device__ __forceinline__ void multiply_pv(unsigned slot) {
    const int lane = threadIdx.x % 32, block = block_of_column(lane % 8), row = block * 4 + lane % 16 / 8,
              vec = lane / 16;
    const float inverse = float_of_bits(static_cast<std::uint32_t>(254 - reference) << 23);
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[0][j][i] *= scale_of_byte(scales[i % 2], j) * inverse;
#pragma unroll
    for (int step = 0; step < 2; ++step) {  // of 16 tokens
      const float(&p)[4] = c[0][2 * step], (&r)[4] = c[0][2 * step + 1];
      const std::uint32_t a[4] = {pack(p[0], p[1], __half{}), pack(p[2], p[3], __half{}), pack(r[0], r[1], __half{}),
                                  pack(r[2], r[3], __half{})};
#pragma unroll
      for (int j = 0; j < DV / 32; ++j) {
        std::uint32_t b[4];
        ldmatrix_x4_trans(b, slot + (step * 2 + row) * v_bytes + ((j * 2 + vec) ^ block) * 16);
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // of 32 columns
          // Bytes of two tokens and two columns: both tokens of a column side by side.
          const HalfPairs first = halves_of(__byte_perm(b[2 * half], 0, 0x3120)),
                          second = halves_of(__byte_perm(b[2 * half + 1], 0, 0x3120));
          float(&even)[4] = o[0][4 * j + 2 * half], (&odd)[4] = o[0][4 * j + 2 * half + 1];
          mma(even, a[0], a[1], a[2], a[3], first.low, second.low, __half{});
          mma(odd, a[0], a[1], a[2], a[3], first.high, second.high, __half{});
        }
      }
    }
  }

  static constexpr int parked_floats = Base::parked_floats + 4;
  __device__ __forceinline__ void park(float* to) const {
    Base::park(to);
    asm volatile("st.b32 [%0], %1;" ::"l"(to + Base::parked_floats), "r"(reference) : "memory");
  }
  template <int Part>
  __device__ __forceinline__ void unpark(const float* from) {
    Base::template unpark<Part>(from);
    asm volatile("ld.b32 %0, [%1];" : "=r"(reference) : "l"(from + Base::parked_floats) : "memory");
  }

  /// store_scaled_o() of WarpTileMma, of rows of `pitch` floats.
  template <int Part = 0, class ScaleOf>
  __device__ __forceinline__ void store_scaled_o(float* to, ScaleOf scale_of, int pitch) const {
    const int g = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
    const float unit = float_of_bits(static_cast<std::uint32_t>(reference) << 23);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float x = scale_of(g + half * 8, Base::total[0][half].m) * unit;
      float* row = to + (g + half * 8) * pitch + quad * 4;
#pragma unroll
      for (int j = 0; j < DV / 16; ++j) {
        const float(&even)[4] = o[0][2 * j], (&odd)[4] = o[0][2 * j + 1];
        *reinterpret_cast<float4*>(row + j * 16) =
            make_float4(x * even[half * 2], x * odd[half * 2], x * even[half * 2 + 1], x * odd[half * 2 + 1]);
      }
    }
  }

 private:
  static __device__ __forceinline__ int block_of_column(int n) { return n / 2 + n % 2 * 4; }
  // A mask of the tokens 4 quad + j + 16 i that exist.
  __device__ __forceinline__ std::uint32_t bytes_of_tokens(int i) const {
    const int count = rows - (static_cast<int>(threadIdx.x) % 4 * 4 + 16 * i);
    return count >= 4 ? 0xFFFFFFFFu : count <= 0 ? 0u : 0xFFFFFFFFu >> (32 - 8 * count);
  }
};

}  // namespace nsa::gpu
