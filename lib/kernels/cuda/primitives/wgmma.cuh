#pragma once
// Warpgroup products (wgmma, sm_90a): 64 rows by N columns by 16, fp32 accumulation, 16-bit operands in shared memory
// under the 128-byte swizzle of the tensor copies (primitives/tma.cuh), or A in registers.
//
// A swizzled box is [rows][64 elements]: 128 bytes a row, 1024-byte aligned. The accumulator of warp w of the four
// holds rows 16w .. 16w+15: lane = 4 * g + t has rows g and g + 8, columns 8j + 2t and 8j + 2t + 1, as d[4j .. 4j+3].

#include <cstdint>

#include "kernels/cuda/runtime/common.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define NSA_WGMMA 1
#endif

namespace nsa::gpu {

/// Descriptor of an operand that starts at `shared`. 8-row groups are 1024 bytes apart (both majors). Where the
/// contiguous dimension is not the one summed over, its next 64 elements are `leading` bytes away.
__device__ __forceinline__ std::uint64_t make_desc(unsigned shared, unsigned leading = 16) {
  return static_cast<std::uint64_t>(shared >> 4 | leading >> 4 << 16) | static_cast<std::uint64_t>(1024 >> 4) << 32 |
         std::uint64_t{1} << 62;
}
/// The descriptor `bytes` further on: one 32-bit addition, as shared memory ends below 256 KB.
__device__ __forceinline__ std::uint64_t advance_desc(std::uint64_t desc, unsigned bytes) {
  return (desc & 0xFFFFFFFF00000000u) | static_cast<unsigned>(static_cast<unsigned>(desc) + (bytes >> 4));
}

/// Before the first product that reads or accumulates in registers written by other instructions.
__device__ __forceinline__ void warpgroup_arrive() {
#ifdef NSA_WGMMA
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
/// The products issued since the last call form one group.
__device__ __forceinline__ void warpgroup_commit_batch() {
#ifdef NSA_WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
/// Until at most `Pending` of the committed groups are in flight.
template <int Pending>
__device__ __forceinline__ void warpgroup_wait() {
#ifdef NSA_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
#endif
}
/// Keeps the computation of x before what follows. Without it ptxas moves arithmetic that could overlap with products
/// to after the wait for them. x must not be negative: then nothing is stored at `shared`.
__device__ __forceinline__ void schedule_barrier(float x, unsigned shared) {
  asm volatile("{\n.reg .pred p;\nsetp.lt.f32 p, %0, 0f00000000;\n@p st.shared.f32 [%1], %0;\n}" ::"f"(x), "r"(shared)
               : "memory");
}
/// After warpgroup_wait: keeps the compiler from reading the accumulator before it.
template <int N>
__device__ __forceinline__ void warpgroup_fence_operand(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// clang-format off
#define NSA_D8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define NSA_D32(d, i) NSA_D8(d, i), NSA_D8(d, i + 8), NSA_D8(d, i + 16), NSA_D8(d, i + 24)
#define NSA_REGISTERS_8 "{%0,%1,%2,%3,%4,%5,%6,%7}"
#define NSA_REGISTERS_16 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}"
#define NSA_REGISTERS_32 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"
#define NSA_REGISTERS_64 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"
// D = A B (or += when `add`): A [64][16] and B [N][16], both with the 16 contiguous.
#define NSA_WGMMA_SS(N, R, TYPE, A, B, ADD)                                                                    \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " " R \
  ", " A ", " B ", p, 1, 1, 0, 0;\n}"
// D += A B: A [64][16] in registers, B [16][N] with the N contiguous.
#define NSA_WGMMA_RS(N, R, TYPE, A0, A1, A2, A3, B)                                                           \
  "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " " R ", {" A0 "," A1 "," A2 "," A3 "}, " B ", 1, 1, 1, 1;"
// D = A B (or += when `add`): A [64][16] in registers, B [N][16] with the 16 contiguous.
#define NSA_WGMMA_RS_K(N, R, TYPE, A0, A1, A2, A3, B, ADD)                                                     \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " " R \
  ", {" A0 "," A1 "," A2 "," A3 "}, " B ", p, 1, 1, 0;\n}"
// clang-format on

/// d [64 x 128] = (add ? d : 0) + a b.
template <class T>
__device__ __forceinline__ void wgmma_ss(float (&d)[64], std::uint64_t a, std::uint64_t b, int add, T) {
#ifdef NSA_WGMMA
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm volatile(NSA_WGMMA_SS("128", NSA_REGISTERS_64, "bf16", "%64", "%65", "%66")
                 : NSA_D32(d, 0), NSA_D32(d, 32)
                 : "l"(a), "l"(b), "r"(add));
  else
    asm volatile(NSA_WGMMA_SS("128", NSA_REGISTERS_64, "f16", "%64", "%65", "%66")
                 : NSA_D32(d, 0), NSA_D32(d, 32)
                 : "l"(a), "l"(b), "r"(add));
#endif
}

/// d [64 x 64] = (add ? d : 0) + a b.
template <class T>
__device__ __forceinline__ void wgmma_ss(float (&d)[32], std::uint64_t a, std::uint64_t b, int add, T) {
#ifdef NSA_WGMMA
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm volatile(NSA_WGMMA_SS("64", NSA_REGISTERS_32, "bf16", "%32", "%33", "%34")
                 : NSA_D32(d, 0)
                 : "l"(a), "l"(b), "r"(add));
  else
    asm volatile(NSA_WGMMA_SS("64", NSA_REGISTERS_32, "f16", "%32", "%33", "%34")
                 : NSA_D32(d, 0)
                 : "l"(a), "l"(b), "r"(add));
#endif
}

/// d [64 x 16] = (add ? d : 0) + a b.
template <class T>
__device__ __forceinline__ void wgmma_ss(float (&d)[8], std::uint64_t a, std::uint64_t b, int add, T) {
#ifdef NSA_WGMMA
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm volatile(NSA_WGMMA_SS("16", NSA_REGISTERS_8, "bf16", "%8", "%9", "%10")
                 : NSA_D8(d, 0)
                 : "l"(a), "l"(b), "r"(add));
  else
    asm volatile(NSA_WGMMA_SS("16", NSA_REGISTERS_8, "f16", "%8", "%9", "%10")
                 : NSA_D8(d, 0)
                 : "l"(a), "l"(b), "r"(add));
#endif
}

/// d [64 x 128] += a b, a in registers.
template <class T>
__device__ __forceinline__ void wgmma_rs(float (&d)[64], const std::uint32_t* a, std::uint64_t b, T) {
#ifdef NSA_WGMMA
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm volatile(NSA_WGMMA_RS("128", NSA_REGISTERS_64, "bf16", "%64", "%65", "%66", "%67", "%68")
                 : NSA_D32(d, 0), NSA_D32(d, 32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  else
    asm volatile(NSA_WGMMA_RS("128", NSA_REGISTERS_64, "f16", "%64", "%65", "%66", "%67", "%68")
                 : NSA_D32(d, 0), NSA_D32(d, 32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#endif
}

/// d [64 x 64] += a b, a in registers.
template <class T>
__device__ __forceinline__ void wgmma_rs(float (&d)[32], const std::uint32_t* a, std::uint64_t b, T) {
#ifdef NSA_WGMMA
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm volatile(NSA_WGMMA_RS("64", NSA_REGISTERS_32, "bf16", "%32", "%33", "%34", "%35", "%36")
                 : NSA_D32(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  else
    asm volatile(NSA_WGMMA_RS("64", NSA_REGISTERS_32, "f16", "%32", "%33", "%34", "%35", "%36")
                 : NSA_D32(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#endif
}

/// d [64 x 32] = (add ? d : 0) + a b, a in registers, b [32][16] with the 16 contiguous.
template <class T>
__device__ __forceinline__ void wgmma_rs(float (&d)[16], const std::uint32_t* a, std::uint64_t b, int add, T) {
#ifdef NSA_WGMMA
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm volatile(NSA_WGMMA_RS_K("32", NSA_REGISTERS_16, "bf16", "%16", "%17", "%18", "%19", "%20", "%21")
                 : NSA_D8(d, 0), NSA_D8(d, 8)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
  else
    asm volatile(NSA_WGMMA_RS_K("32", NSA_REGISTERS_16, "f16", "%16", "%17", "%18", "%19", "%20", "%21")
                 : NSA_D8(d, 0), NSA_D8(d, 8)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
#endif
}

/// Warpgroups move registers from the producers to the consumers. All warps of a warpgroup call it.
template <int Registers>
__device__ __forceinline__ void warpgroup_reg_alloc() {
#ifdef NSA_WGMMA
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
}
template <int Registers>
__device__ __forceinline__ void warpgroup_reg_dealloc() {
#ifdef NSA_WGMMA
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
}

#undef NSA_D8
#undef NSA_D32
#undef NSA_REGISTERS_8
#undef NSA_REGISTERS_16
#undef NSA_REGISTERS_32
#undef NSA_REGISTERS_64
#undef NSA_WGMMA_SS
#undef NSA_WGMMA_RS
#undef NSA_WGMMA_RS_K

}  // namespace nsa::gpu
