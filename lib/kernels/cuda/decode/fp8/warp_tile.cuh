#pragma once
// Warp tile for E4M3 rows with a power of two a row (shared/e4m3.hpp): tensor cores in fp16, which holds every E4M3
// value, up to 16 heads. decode/split_kv/warp_tile.cuh describes the operations.
//
// A lane gets four neighbouring values of a row where 16-bit storage has two. For Q K^T the 16 columns of a product are
// in another order than in memory, in Q and in K: the sum of a product of 16 has the same bits. For P V the even and
// the odd columns of 16 are two products, so that a lane has four neighbouring columns of o. Q is scaled by a power of
// two a head into the range of fp16. The scale of a row of K multiplies its scores, up to the powers of two by which
// heads differ, which enter where the maximum is subtracted; that of a row of V multiplies its P, relative to the
// largest scale so far, which o is relative to. All of these are exact, but that P is rounded to fp16: scores have the
// bits that 16-bit storage of the same values gives.
//
// A lane converts the scales of one row, and the lanes exchange them by shuffles. o is relative to a maximum
// that grows by more than 2^8 at a time: P stays below 2^8, and o is rarely rescaled.

#include "kernels/cuda/decode/split_kv/warp_tile_mma.cuh"
#include "kernels/cuda/primitives/e4m3.cuh"

namespace nsa::gpu {

/// x, which the compiler would else compute anew for every tile.
__device__ __forceinline__ unsigned kept_in_register(unsigned x) {
  return __shfl_sync(0xffffffffu, x, threadIdx.x % 32);
}

template <class T, int DK, int DV>
struct WarpTileFp8 : WarpTileMma<T, DK, DV> {
  using Base = WarpTileMma<T, DK, DV>;
  using Base::c;
  using Base::o;
  static constexpr int element_bytes = 1, k_bytes = DK, v_bytes = DV;
  static constexpr int query_bytes = Base::query_bytes + Base::heads * 4;
  static_assert(DK == 128 && DV == 128, "a row is 128 bytes");

  unsigned queries;                   // shared: operand A of this lane
  unsigned key_offset, value_offset;  // in a slot, of what this lane reads by ldmatrix
  unsigned sums_index;                // of this lane's first block sum of a tile
  float scale;                        // of all scores, beside the factors of heads and rows
  float head_factor[2];               // of the scores of heads g and g + 8: a power of two, at least 1
  float key_factors[2][4];            // of the rows 4 quad + j, then + 16
  unsigned value_factors;             // fp16, of V, lane i < 16: of the rows i and i + 16
  int reference = 0;                  // o is relative to 2^(reference - 127)

  /// Queries of 16-bit storage, which all threads have stored, to fp16 as operands A: [Dk / 16][lane] vectors, then
  /// the power of two of each head. All threads of the CTA; the caller waits for them before and after.
  static __device__ __forceinline__ void convert_queries(char* queries, int thread) {
    constexpr int groups = DK / 16, items = Base::heads * groups;  // a thread has 16 columns of a head
    const int head = thread / groups, group = thread % groups;
    std::uint32_t pairs[8];
    int exponent = 0;
    if (thread < items) {
      const unsigned first = head * (DK / 8) + group * 2;
      const uint4 vectors[2] = {*reinterpret_cast<const uint4*>(queries + QueryRows<DK * 2>::offset(first)),
                                *reinterpret_cast<const uint4*>(queries + QueryRows<DK * 2>::offset(first + 1))};
      const T* x = reinterpret_cast<const T*>(vectors);
      std::uint32_t largest = 0;
#pragma unroll
      for (int i = 0; i < 16; ++i) largest = max(largest, magnitude_bits(to_float(x[i])));
#pragma unroll
      for (int lanes = 1; lanes < groups; lanes *= 2)
        largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
      // The largest has the exponent 14: 2^15 is below the largest fp16.
      exponent = min(126, max(-126, largest == 0 ? 0 : 14 + 127 - static_cast<int>(largest >> 23)));
      const float factor = float_of_bits(static_cast<std::uint32_t>(127 + exponent) << 23);
#pragma unroll
      for (int i = 0; i < 8; ++i)
        pairs[i] = pack(to_float(x[2 * i]) * factor, to_float(x[2 * i + 1]) * factor, __half{});
    }
    __syncthreads();
    if (thread >= items) return;
    auto* words = reinterpret_cast<std::uint32_t*>(queries) + (group * 32 + head % 8 * 4) * 4 + head / 8;
#pragma unroll
    for (int t = 0; t < 4; ++t) words[t * 4] = pairs[2 * t], words[t * 4 + 2] = pairs[2 * t + 1];
    if (group == 0)
      reinterpret_cast<float*>(queries + Base::query_bytes)[head] =
          float_of_bits(static_cast<std::uint32_t>(127 - exponent) << 23);
  }

  __device__ __forceinline__ WarpTileFp8(char* queries_of_cta, char* prob, const LayerShape& s)
      : Base(queries_of_cta, prob, s) {
    const int lane = threadIdx.x % 32, block = block_of_column(lane % 8);
    queries = kept_in_register(shared_address(queries_of_cta) + lane * 16);
    key_offset = kept_in_register(block * 4 * k_bytes + (lane / 8 ^ block) * 16);
    value_offset = kept_in_register((block * 4 + lane % 16 / 8) * v_bytes + (lane / 16 ^ block) * 16);
    sums_index = kept_in_register(lane / 16 * (4 * tile_blocks) + lane % 4 * 4 + lane / 4 % 4);
    const auto* powers = reinterpret_cast<const std::uint32_t*>(queries_of_cta + Base::query_bytes);
    const std::uint32_t least = __reduce_min_sync(0xffffffffu, powers[lane % 16]);
    scale = Base::softmax_scale * float_of_bits(least);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      head_factor[half] = float_of_bits(min(powers[lane / 4 + half * 8] - least + 0x3F800000u, 0x7F000000u));
  }

  __device__ __forceinline__ void multiply_qk(unsigned slot, int = 0) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[0][j][i] = 0.0f;
#pragma unroll
    for (int part = 0; part < DK / 64; ++part) {
      uint4 a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = load_four_words(queries + (part * 4 + i) * 512);
      const unsigned at = slot + key_offset ^ part * 64;
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

  /// Scores relative to head_factor.
  __device__ __forceinline__ void scale_scores() {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[0][j][i] = __fmul_rn(c[0][j][i], key_factors[i % 2][j]);
  }
  /// Stores the scaled score of the last token of a full tile to row `i` of halo scores, of 16 heads.
  __device__ __forceinline__ void store_last_score(float* halo_scores, int i, int tokens, std::uint64_t policy) const {
    const int lane = threadIdx.x % 32;
    if (lane % 4 < 3 || tokens < tile_rows) return;
    float* to = halo_scores + static_cast<unsigned>(i * Base::heads + lane / 4);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      store_word_with_policy(to + half * 8, __fmul_rn(c[0][3][half * 2 + 1], head_factor[half]), policy);
  }

  /// online_softmax() of WarpTileMma. A product with head_factor is exact, so exponentials and (m, s) of the tile have
  /// the same bits. store_sums() is called when the exponentials are relative to the maximum of the tile.
  template <class StoreSums>
  __device__ __forceinline__ void online_softmax(int tokens, StoreSums store_sums) {
    Base::mask_rows(tokens);
    auto& tile = Base::tile[0];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float m = fmaxf(c[0][0][half * 2], c[0][0][half * 2 + 1]);
#pragma unroll
      for (int j = 1; j < 4; ++j) m = fmaxf(m, fmaxf(c[0][j][half * 2], c[0][j][half * 2 + 1]));
      tile[half].m = m = fmaxf(neg_inf, __fmul_rn(quad_max(m), head_factor[half]));
      tile[half].s = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float(&e)[4] = c[0][j];
        e[half * 2] = exp2_fast(__fmaf_rn(e[half * 2], head_factor[half], -m));
        e[half * 2 + 1] = exp2_fast(__fmaf_rn(e[half * 2 + 1], head_factor[half], -m));
        tile[half].s += e[half * 2] + e[half * 2 + 1];
      }
    }
    store_sums();
    add_tile();
  }

  /// Stores the block sums of tile i of those of a work item, as WarpTileMma; called by online_softmax().
  __device__ __forceinline__ void store_block_sums(float* sums, int i, std::uint64_t policy) const {
    const int lane = threadIdx.x % 32, quad = lane % 4, left = lane / 4 * 4 + (quad + 3) % 4;
    float* to = sums + static_cast<unsigned>(i * (Base::heads * tile_blocks) + sums_index);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float(&e)[4][4] = c[0];
      const int at = half * 2;
      const float halo = __shfl_sync(0xffffffffu, e[3][at], left), later = __shfl_sync(0xffffffffu, e[3][at + 1], left);
      float* first = to + half * 8 * tile_blocks;
      store_word_with_policy(first, block_sum(e[0][at], e[1][at], e[2][at], e[3][at], quad == 0 ? 0.0f : halo), policy);
      store_word_with_policy(
          first + 16, block_sum(e[0][at + 1], e[1][at + 1], e[2][at + 1], e[3][at + 1], quad == 0 ? halo : later),
          policy);
    }
  }
  /// store_tile_lse() of WarpTileMma, of tile i of those of a work item.
  __device__ __forceinline__ void store_tile_lse(float2* sums, int i) const {
    const int lane = threadIdx.x % 32;
    if (lane % 4 != 0) return;
    float2* to = sums + static_cast<unsigned>(i * Base::heads + lane / 4);
    to[0] = make_float2(Base::tile[0][0].m, Base::tile[0][0].s);
    to[8] = make_float2(Base::tile[0][1].m, Base::tile[0][1].s);
  }

  /// Loads the scales of the rows of K and of V, those of this lane at shared addresses `at` and `at` + 32. Of V `rows`
  /// count: o is brought to the largest of theirs, where that is larger than those before. A NaN row, whose scale is
  /// the largest, makes all of o NaN.
  __device__ __forceinline__ void load_scales(unsigned at, int rows) {
    const int lane = threadIdx.x % 32;
    int of_k, of_v;
    asm volatile("ld.shared.u8 %0, [%2];\nld.shared.u8 %1, [%2 + 32];" : "=r"(of_k), "=r"(of_v) : "r"(at) : "memory");
    if (lane >= rows) of_v = 0;
    if (__any_sync(0xffffffffu, of_v > reference)) raise_reference(of_v);
    const float k_factor = scale * float_of_bits(static_cast<std::uint32_t>(of_k) << 23),
                v_factor = float_of_bits(static_cast<std::uint32_t>(max(0, of_v - reference + 127)) << 23);
    const unsigned v_half = __half_as_ushort(__float2half_rn(v_factor));
    value_factors = v_half | __shfl_down_sync(0xffffffffu, v_half, 16) << 16;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) key_factors[i][j] = __shfl_sync(0xffffffffu, k_factor, lane % 4 * 4 + i * 16 + j);
  }

  template <int Panel = 0>
  __device__ __forceinline__ void multiply_pv(unsigned slot) {
    const unsigned at = slot + value_offset;
    std::uint32_t row_factors[4];  // of rows 4 quad + j and + 16
#pragma unroll
    for (int j = 0; j < 4; ++j) row_factors[j] = __shfl_sync(0xffffffffu, value_factors, threadIdx.x % 4 * 4 + j);
#pragma unroll
    for (int step = 0; step < 2; ++step) {  // of 16 tokens
      std::uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = 2 * step + i / 2;
        a[i] = multiply_halves(pack(c[0][j][i % 2 * 2], c[0][j][i % 2 * 2 + 1], __half{}), row_factors[j]);
      }
#pragma unroll
      for (int j = 0; j < DV / 32; ++j) {
        std::uint32_t b[4];
        ldmatrix_x4_trans(b, (at ^ j * 32) + step * 2 * v_bytes);
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
  static __device__ __forceinline__ uint4 load_four_words(unsigned at) {
    uint4 four;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(four.x), "=r"(four.y), "=r"(four.z), "=r"(four.w)
                 : "r"(at)
                 : "memory");
    return four;
  }
  static __device__ __forceinline__ std::uint32_t multiply_halves(std::uint32_t a, std::uint32_t b) {
    std::uint32_t product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
  }
  // The exponentials of the tile to P, and its (m, s) into the state.
  __device__ __forceinline__ void add_tile() {
    constexpr float most = 8.0f;  // P is at most 2^8
    auto& tile = Base::tile[0];
    auto& total = Base::total[0];
    const bool raises = tile[0].m - total[0].m > most || tile[1].m - total[1].m > most;
    if (__any_sync(0xffffffffu, raises)) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float m = tile[half].m - total[half].m > most ? tile[half].m : total[half].m,
                    factor = exp2_fast(total[half].m - m);
        total[half] = {m, total[half].s * factor};
#pragma unroll
        for (int j = 0; j < DV / 8; ++j) o[0][j][half * 2] *= factor, o[0][j][half * 2 + 1] *= factor;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float p = exp2_fast(tile[half].m - total[half].m);
      tile[half].s = quad_sum(tile[half].s);
      total[half].s = __fmaf_rn(tile[half].s, p, total[half].s);
#pragma unroll
      for (int j = 0; j < 4; ++j) c[0][j][half * 2] *= p, c[0][j][half * 2 + 1] *= p;
    }
  }
  // Scales of rows of V, one a lane.
  __device__ __forceinline__ void raise_reference(int of_v) {
    const int largest = __reduce_max_sync(0xffffffffu, of_v);
    const float factor = float_of_bits(static_cast<std::uint32_t>(max(0, 127 + reference - largest)) << 23);
    reference = largest;
#pragma unroll
    for (int j = 0; j < DV / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) o[0][j][i] *= factor;
  }
};

}  // namespace nsa::gpu
