#include "gpu/differences.hpp"
#include "kernels/cuda/runtime/common.cuh"

namespace nsa::test {

namespace {

struct Found {
  unsigned long long count, first;
};

__global__ void compare(const unsigned* a, const unsigned* b, std::int64_t words, Found* found) {
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < words; i += gridDim.x * blockDim.x) {
    if (a[i] == b[i]) continue;
    atomicAdd(&found->count, 1ull);
    atomicMin(&found->first, static_cast<unsigned long long>(i));
  }
}

}  // namespace

Differences differences(const void* a, const void* b, std::size_t bytes, Stream* stream) {
  Found found{0, ~0ull}, *on_device = nullptr;
  gpu::check(cudaMallocAsync(&on_device, sizeof found, gpu::cuda(stream)), "cudaMallocAsync");
  gpu::check(cudaMemcpyAsync(on_device, &found, sizeof found, cudaMemcpyDefault, gpu::cuda(stream)), "cudaMemcpyAsync");
  compare<<<1024, 256, 0, gpu::cuda(stream)>>>(static_cast<const unsigned*>(a), static_cast<const unsigned*>(b),
                                               static_cast<std::int64_t>(bytes / sizeof(unsigned)), on_device);
  gpu::check(cudaMemcpyAsync(&found, on_device, sizeof found, cudaMemcpyDefault, gpu::cuda(stream)), "cudaMemcpyAsync");
  gpu::check(cudaFreeAsync(on_device, gpu::cuda(stream)), "cudaFreeAsync");
  gpu::check(cudaStreamSynchronize(gpu::cuda(stream)), "cudaStreamSynchronize");
  return {found.count, found.first};
}

}  // namespace nsa::test
