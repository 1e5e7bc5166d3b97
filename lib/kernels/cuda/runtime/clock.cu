// Reads the time in nanoseconds and the cycles of an SM. After the method of nvbench: a block of one thread for each
// SM; the one on SM 0 writes, because cycles of two SMs cannot be subtracted.

#include "kernels/cuda/runtime/clock.cuh"
#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {
namespace {

__global__ void stamp_kernel(std::int64_t* ring) { ring[1 + ring[0]++] = device_nanoseconds(); }

__global__ void read_clock_kernel(ClockReading* reading) {
  unsigned sm;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
  if (sm != 0) return;
  *reading = {device_nanoseconds(), clock64()};
}

}  // namespace

void stamp(std::int64_t* ring, Stream* stream) {
  stamp_kernel<<<1, 1, 0, cuda(stream)>>>(ring);
  check_launch("stamp");
}

ClockReading read_clock(Stream* stream) {
  static ClockReading* const reading = [] {
    ClockReading* memory = nullptr;
    check(cudaMalloc(&memory, sizeof *memory), "cudaMalloc");
    return memory;
  }();
  ClockReading result;
  check(cudaMemsetAsync(reading, 0, sizeof *reading, cuda(stream)), "cudaMemsetAsync");
  read_clock_kernel<<<limits().sms, 1, 0, cuda(stream)>>>(reading);
  check_launch("read_clock");
  check(cudaMemcpyAsync(&result, reading, sizeof result, cudaMemcpyDeviceToHost, cuda(stream)), "cudaMemcpyAsync");
  check(cudaStreamSynchronize(cuda(stream)), "cudaStreamSynchronize");
  return result;
}

}  // namespace nsa::gpu
