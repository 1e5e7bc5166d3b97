#pragma once
// mbarriers: barriers in shared memory that count arrivals of threads and bytes of asynchronous copies (PTX mbarrier,
// capability 8.0; copies and waits by parity 9.0). CCCL's cuda::ptx compiles to the same machine code and needs CUDA
// 12.4; the oldest supported toolkit is 12.0.

#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

/// What a shared memory struct declares for each barrier. The functions take the barrier's shared_address().
///
/// A phase of a barrier ends when all expected arrivals and bytes have come. A fresh barrier is in phase 0, and the
/// phase before it counts as complete.
using MbarrierWord = std::uint64_t;

/// One thread, before a __syncthreads; `arrivals` that end a phase.
__device__ __forceinline__ void mbarrier_init(unsigned barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
/// `count` arrivals.
__device__ __forceinline__ void mbarrier_arrive(unsigned barrier, int count = 1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
#endif
}
/// By a predicate and no branch: a branch would serialise products that are in flight.
__device__ __forceinline__ void mbarrier_arrive_if(unsigned barrier, bool arrives) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %1, 0;\n@p mbarrier.arrive.shared.b64 _, [%0];\n}" ::"r"(barrier),
               "r"(static_cast<int>(arrives))
               : "memory");
#endif
}
/// One arrival, and `bytes` that copies add to the phase.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(unsigned barrier, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
}
/// Until the phase of this parity is complete. The barrier must be in that phase or the next one.
__device__ __forceinline__ void mbarrier_wait(unsigned barrier, int parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra AGAIN;\n}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
#endif
}
/// Arrives and waits until all expected threads have: a __syncthreads of some warps. Capability 8.0.
__device__ __forceinline__ void mbarrier_arrive_and_wait(unsigned barrier) {
  std::uint64_t phase;
  asm volatile("mbarrier.arrive.shared.b64 %0, [%1];" : "=l"(phase) : "r"(barrier) : "memory");
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier."
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
      "try_wait"
#else
      "test_wait"
#endif
      ".shared.b64 done, [%0], %1;\n@!done bra AGAIN;\n}" ::"r"(barrier),
      "l"(phase)
      : "memory");
}
/// After the inits and before the __syncthreads that shows the barriers to all threads: shows them to the copy engine.
__device__ __forceinline__ void fence_mbarrier_init() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/// A __syncthreads of the `threads` threads that call it with this `id` (1 .. 15; 0 is __syncthreads' own).
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// A producer's or consumer's position in a ring of `Slots` slots: the slot, and the parity of the round. A consumer
/// waits for the slot's full barrier with `phase`, a producer for its empty barrier with `phase ^ 1`.
template <int Slots>
struct PipelineState {
  int slot = 0, phase = 0;
  __device__ __forceinline__ void advance() {
    if (++slot == Slots) slot = 0, phase ^= 1;
  }
};

}  // namespace nsa::gpu
