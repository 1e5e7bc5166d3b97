#pragma once
// Included by every .cu file: checked calls, launches, storage types, dispatch by type, warp reductions.

#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>

#include "kernels/cuda/sizes/limits.hpp"
#include "kernels/cuda/sizes/score_layout.hpp"
#include "kernels/diagnostics/error.hpp"
#include "kernels/interface/kernel_table.hpp"

namespace nsa::gpu {

inline void check(cudaError_t code, const char* call) {
  if (code == cudaSuccess) return;
  throw UserError(std::string(call) + " failed (" + cudaGetErrorString(code) +
                      "); look at nvidia-smi, or run under compute-sanitizer",
                  ExitCode::device);
}

inline void check(cublasStatus_t code, const char* call) {
  if (code == CUBLAS_STATUS_SUCCESS) return;
  throw UserError(std::string(call) + " failed (" + cublasGetStatusString(code) + "); look at nvidia-smi",
                  ExitCode::device);
}

/// Throws for a kernel that did not start: LaunchError while the context is usable, UserError(device) otherwise.
[[noreturn]] void refuse_launch(cudaError_t code, const char* call);

/// Checks a call that starts a kernel or prepares its start.
inline void check_start(cudaError_t code, const char* call) {
  if (code != cudaSuccess) refuse_launch(code, call);
}
/// After each launch: checks the error of the launch itself.
inline void check_launch(const char* kernel) { check_start(cudaGetLastError(), kernel); }

/// A Stream is an opaque cudaStream_t.
inline cudaStream_t cuda(Stream* stream) { return reinterpret_cast<cudaStream_t>(stream); }

/// The process's cuBLAS handle, set to `stream`, with its own workspace (graph capture needs one).
cublasHandle_t blas(Stream* stream);

/// Raises a kernel's dynamic shared memory limit where it needs more than the default.
template <class Kernel>
void allow_shared(Kernel* kernel, std::size_t bytes) {
  if (bytes > (48u << 10))
    check_start(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
                "cudaFuncSetAttribute");
}

/// Launches a kernel that may be scheduled while its predecessor on the stream still runs (programmatic dependent
/// launch, capability 9.0 and later): the kernel must call griddep_wait() before it accesses memory. Each `cluster`
/// neighbouring CTAs in x form a cluster (capability 9.0; 1 elsewhere).
template <class... Params, class... Args>
void launch_pdl(void (*kernel)(Params...), dim3 grid, int threads, std::size_t shared, Stream* stream, int cluster,
                Args&&... args) {
  allow_shared(kernel, shared);
  if (cluster > 8)
    check_start(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
                "cudaFuncSetAttribute");
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = cuda(stream);
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  config.attrs = attributes;
  config.numAttrs = limits().capability < 90 ? 0 : cluster > 1 ? 2 : 1;
  check_start(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), "cudaLaunchKernelEx");
}

/// All threads, before any memory access: waits until the predecessor is complete, then allows the successor to be
/// scheduled.
__device__ __forceinline__ void griddep_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// Orders this thread's accesses to shared memory before later ones of the copy engine and the tensor cores (the async
/// proxy). A consumer needs it before it releases a slot: an arrival at an mbarrier does not wait for an ldmatrix that
/// is in flight, and the next copy into the slot may overtake it.
__device__ __forceinline__ void fence_proxy_async() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/// Calls f with a value of the storage type.
template <class F>
void with_type(DType type, F&& f) {
  if (type == DType::bf16)
    f(__nv_bfloat16{});
  else if (type == DType::f16)
    f(__half{});
  else
    f(float{});
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void store(float* to, float x) { *to = x; }
__device__ __forceinline__ void store(__half* to, float x) { *to = __float2half_rn(x); }
__device__ __forceinline__ void store(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }

__device__ __forceinline__ float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

/// Factor from natural to base-2 exponents: raw scores are stored in base 2.
constexpr float log2_e = 1.4426950408889634f;

/// Initial row maximum. Finite, so that the difference of two is no NaN.
constexpr float neg_inf = -1e30f;

/// 32-bit address in the shared window, of a pointer to shared memory.
__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

/// 2^x; 0 for -inf, subnormal results flushed.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// exp(x - m); 0 where x is -inf, also if m is -inf.
__device__ __forceinline__ float exp_shifted(float x, float m) {
  return x == -INFINITY ? 0.0f : exp2f((x - m) * log2_e);
}

/// Column of compressed token i of chunk c in the raw scores. A token in the halo of chunk c has a column of its own.
__device__ __forceinline__ std::int64_t score_column(const RowMap& map, std::int64_t c, std::int64_t i) {
  return scores_by_chunk(map) ? c / map.kv * score_stride(map) + score_halo_columns(map) + (i - c * map.chunk) : i;
}

/// Row r of a tile.
struct TileRow {
  std::int64_t sequence;  ///< index in the tile
  std::int64_t t;         ///< absolute position
};
__device__ __forceinline__ TileRow tile_row(const QueryTile& tile, std::int64_t r) {
  return {sequence_of_row(tile, r), position_of_row(tile, r)};
}

constexpr int max_split_rows = 1024;  ///< work items (row, group, head tile) that may be split: counters per branch

/// Arrivals by work item [max_split_rows]; zero between launches: the last to arrive resets them.
unsigned* arrival_counters(Branch branch);

}  // namespace nsa::gpu
