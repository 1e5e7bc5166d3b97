// A small all-gather: every rank stores what it has straight into its peers' memory, and takes theirs from its own.
//
// Tiling: a CTA of 256 threads carries 4 KB to one peer and takes as much from it. Rounds (blockIdx.y) pair the ranks:
// in round y rank r meets rank y - r (modulo the size), which meets it there too, so that CTAs that wait for each other
// have the same number and start in the same order, however few fit the GPU; in one round a rank meets itself. A thread
// carries 16 bytes as two pairs of pairs (4 bytes, count): a 64-bit word is read as it was written, so data that stand
// beside the count that is waited for are those of this exchange. No fence, no flag behind the data, no CTA waits for
// another of its own GPU.
// Bytes: twice the message over the link, and once more from L2. Bound: a store's way to the peer and a load from L2,
// some 2 us with the launch; from some 100 KB on the link (450 GB/s a direction on NVLink 4).
//
// Counts: a CTA counts the exchanges that it took part in, in device memory, so that a replayed graph goes on counting;
// the peer's CTA has counted the same ones. Two slots, by the count's last bit, are enough: who pushes exchange n + 1
// is through with n and so has seen the peer's part of it; the peer then was through with n - 1, which lay in the same
// slot, for a communicator's kernels run one after the other. A count comes again after 2^32 exchanges, which matters
// only to a line of whose CTA's exchanges all but the first and the last were too short for it.

#include <algorithm>

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/peer_gather.hpp"

namespace nsa::gpu {

namespace {

constexpr int threads = static_cast<int>(gather_threads);

struct Gather {
  PeerGroup group;
  const char* send;
  char* recv;
  std::size_t bytes, slot;
  int most_ctas;  // of a round
};

// A thread's two pairs of pairs: neighbours' lie side by side.
__device__ __forceinline__ std::byte* pairs_of(std::byte* slot, std::size_t item, int half) {
  return slot + item / 32 * 1024 + half * 512 + item % 32 * 16;
}

__device__ __forceinline__ void push(std::byte* to, std::uint32_t a, std::uint32_t b, std::uint32_t count) {
  const std::uint64_t mark = std::uint64_t{count} << 32;
  asm volatile("st.relaxed.sys.global.v2.b64 [%0], {%1, %2};" ::"l"(to), "l"(mark | a), "l"(mark | b) : "memory");
}

__device__ __forceinline__ ulonglong2 peek(const std::byte* from) {
  ulonglong2 x;
  asm volatile("ld.relaxed.sys.global.v2.b64 {%0, %1}, [%2];" : "=l"(x.x), "=l"(x.y) : "l"(from) : "memory");
  return x;
}

__device__ __forceinline__ bool gave_up(const int* flag) {
  int value;
  asm volatile("ld.relaxed.sys.global.b32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value != 0;
}

// Waits for the peer; a watchdog, not this kernel, says when it has waited for too long.
__device__ __forceinline__ uint4 take(std::byte* slot, std::size_t item, std::uint32_t count, const int* given_up) {
  for (unsigned looks = 1;; ++looks) {
    const ulonglong2 x = peek(pairs_of(slot, item, 0)), y = peek(pairs_of(slot, item, 1));
    const auto fresh = [&](unsigned long long pair) { return static_cast<std::uint32_t>(pair >> 32) == count; };
    if ((fresh(x.x) && fresh(x.y) && fresh(y.x) && fresh(y.y)) || (looks % 4096 == 0 && gave_up(given_up)))
      return make_uint4(static_cast<unsigned>(x.x), static_cast<unsigned>(x.y), static_cast<unsigned>(y.x),
                        static_cast<unsigned>(y.y));
  }
}

// 16 bytes, or as many as there are; a message may begin and end anywhere.
__device__ __forceinline__ uint4 load(const char* from, std::size_t bytes) {
  if (bytes >= line_data && reinterpret_cast<std::uintptr_t>(from) % line_data == 0)
    return *reinterpret_cast<const uint4*>(from);
  uint4 x = {};
#pragma unroll 1
  for (std::size_t i = 0; i < min(bytes, line_data); ++i) reinterpret_cast<char*>(&x)[i] = from[i];
  return x;
}
__device__ __forceinline__ void store(char* to, uint4 x, std::size_t bytes) {
  if (bytes >= line_data && reinterpret_cast<std::uintptr_t>(to) % line_data == 0) {
    *reinterpret_cast<uint4*>(to) = x;
    return;
  }
#pragma unroll 1
  for (std::size_t i = 0; i < min(bytes, line_data); ++i) to[i] = reinterpret_cast<const char*>(&x)[i];
}

__global__ void __launch_bounds__(threads) gather_kernel(const __grid_constant__ Gather g) {
  wait_for_previous();
  const int rank = g.group.rank, size = g.group.size, round = blockIdx.y;
  const int peer = round < rank ? round - rank + size : round - rank;
  const std::size_t item = std::size_t{blockIdx.x} * threads + threadIdx.x, at = item * line_data, here = g.bytes - at;
  char* to = g.recv + peer * g.bytes + at;
  if (peer == rank) {
    if (at < g.bytes && to != g.send + at) store(to, load(g.send + at, here), here);
    return;
  }
  std::uint32_t& counted =
      reinterpret_cast<std::uint32_t*>(g.group.memory[rank] + counts_at)[round * g.most_ctas + blockIdx.x];
  const std::uint32_t count = counted + 1;
  if (at < g.bytes) {
    const uint4 own = load(g.send + at, here);
    const std::size_t slot = (count % 2 * size + round) * g.slot;
    push(pairs_of(g.group.memory[peer] + slot, item, 0), own.x, own.y, count);
    push(pairs_of(g.group.memory[peer] + slot, item, 1), own.z, own.w, count);
    store(to, take(g.group.memory[rank] + slot, item, count, g.group.given_up), here);
  }
  __syncthreads();  // all have read the count
  if (threadIdx.x == 0) counted = count;
}

}  // namespace

void peer_gather(const PeerGroup& group, const void* send, void* recv, std::size_t bytes, Stream* stream) {
  const std::size_t most = most_gathered(group.size);
  if (bytes > most)
    throw InternalError("peer_gather of " + std::to_string(bytes) + " bytes a rank (there is room for " +
                        std::to_string(most) + ")");
  const dim3 grid(static_cast<unsigned>((bytes + cta_data - 1) / cta_data), static_cast<unsigned>(group.size));
  launch_early(gather_kernel, grid, threads, 0, stream, 1,
               Gather{group, static_cast<const char*>(send), static_cast<char*>(recv), bytes, 2 * most,
                      static_cast<int>(most / cta_data)});
}

// What the driver refuses here is no error of the run: another way is taken.
bool name_memory(void* memory, MemoryHandle& handle) noexcept {
  static_assert(sizeof(cudaIpcMemHandle_t) == sizeof(MemoryHandle));
  const cudaError_t code = cudaIpcGetMemHandle(reinterpret_cast<cudaIpcMemHandle_t*>(handle.data()), memory);
  (void)cudaGetLastError();
  return code == cudaSuccess;
}

std::byte* open_memory(const MemoryHandle& handle) noexcept {
  cudaIpcMemHandle_t its;
  std::copy_n(handle.data(), sizeof its, its.reserved);
  void* memory = nullptr;
  const cudaError_t code = cudaIpcOpenMemHandle(&memory, its, cudaIpcMemLazyEnablePeerAccess);
  (void)cudaGetLastError();
  return code == cudaSuccess ? static_cast<std::byte*>(memory) : nullptr;
}

void close_memory(std::byte* memory) noexcept {
  (void)cudaDeviceSynchronize();
  (void)cudaIpcCloseMemHandle(memory);
}

int* make_host_flag() noexcept {
  int* flag = nullptr;
  const cudaError_t code = cudaHostAlloc(&flag, sizeof *flag, cudaHostAllocMapped);
  (void)cudaGetLastError();
  if (code != cudaSuccess) return nullptr;
  *flag = 0;
  return flag;
}

void free_host_flag(int* flag) noexcept { (void)cudaFreeHost(flag); }

}  // namespace nsa::gpu
