#pragma once
// A ring of shared-memory slots that one thread fills by bulk copies (cp.async.bulk) while warps read: capability 9.0.

#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

/// `Slots` slots of `Bytes`; fills and reads go round in the same order. `full` and `empty` are mbarriers.
template <int Slots, int Bytes>
struct BulkPipeline {
  char* memory;          ///< shared, [Slots][Bytes], 16-byte aligned
  std::uint64_t* full;   ///< shared, [Slots]
  std::uint64_t* empty;  ///< shared, [Slots]
  int slot = 0, phase = 0;

  static __device__ __forceinline__ unsigned at(const void* shared) {
    return static_cast<unsigned>(__cvta_generic_to_shared(shared));
  }
  /// By one thread, before a __syncthreads.
  __device__ __forceinline__ void init(int consumers) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    for (int i = 0; i < Slots; ++i) {
      asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(at(full + i)));
      asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at(empty + i)), "r"(consumers));
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
  }
  __device__ __forceinline__ void next() {
    if (++slot == Slots) slot = 0, phase ^= 1;
  }
  static __device__ __forceinline__ void wait(const std::uint64_t* barrier, int parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra AGAIN;\n}" ::"r"(
            at(barrier)),
        "r"(parity)
        : "memory");
#endif
  }
  /// The producer thread: waits for the slot, queues the copy, moves on. A fresh ring is empty.
  __device__ __forceinline__ void producer_load(const void* from, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    wait(empty + slot, phase ^ 1);
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(at(full + slot)), "r"(bytes) : "memory");
    if (bytes > 0)
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       at(memory + slot * Bytes)),
                   "l"(from), "r"(bytes), "r"(at(full + slot))
                   : "memory");
    next();
#endif
  }
  /// A consumer warp: the full slot; consumer_release() when its lanes are done with it.
  __device__ __forceinline__ const void* consumer_wait() const {
    wait(full + slot, phase);
    return memory + slot * Bytes;
  }
  __device__ __forceinline__ void consumer_release() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    fence_proxy_async();
    __syncwarp();
    if (threadIdx.x % 32 == 0) asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(at(empty + slot)) : "memory");
    next();
#endif
  }
};

}  // namespace nsa::gpu
