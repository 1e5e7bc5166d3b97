#pragma once
// A ring of shared-memory slots that one thread fills by bulk copies (cp.async.bulk) while warps read: capability 9.0.

#include "kernels/cuda/primitives/mbarrier.cuh"

namespace nsa::gpu {

/// `Slots` slots of `Bytes`; producer and consumers go round in the same order.
template <int Slots, int Bytes>
struct BulkPipeline {
  char* memory;         ///< shared, [Slots][Bytes], 16-byte aligned
  MbarrierWord* full;   ///< shared, [Slots]
  MbarrierWord* empty;  ///< shared, [Slots]
  PipelineState<Slots> state = {};

  /// One thread, before a __syncthreads. `consumers`: warps that read every slot.
  __device__ __forceinline__ void init(int consumers) const {
    for (int i = 0; i < Slots; ++i) {
      mbarrier_init(shared_address(full + i), 1);
      mbarrier_init(shared_address(empty + i), consumers);
    }
    fence_mbarrier_init();
  }
  /// The producer thread: waits until the slot is empty, issues the copy, moves on. A fresh ring is empty.
  __device__ __forceinline__ void producer_load(const void* from, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    mbarrier_wait(shared_address(empty + state.slot), state.phase ^ 1);
    mbarrier_arrive_expect_tx(shared_address(full + state.slot), bytes);
    if (bytes > 0)
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       shared_address(memory + state.slot * Bytes)),
                   "l"(from), "r"(bytes), "r"(shared_address(full + state.slot))
                   : "memory");
    state.advance();
#endif
  }
  /// A consumer warp: the full slot; consumer_release() when its lanes have read it.
  __device__ __forceinline__ const void* consumer_wait() const {
    mbarrier_wait(shared_address(full + state.slot), state.phase);
    return memory + state.slot * Bytes;
  }
  __device__ __forceinline__ void consumer_release() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    fence_proxy_async();
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(shared_address(empty + state.slot));
    state.advance();
#endif
  }
};

}  // namespace nsa::gpu
