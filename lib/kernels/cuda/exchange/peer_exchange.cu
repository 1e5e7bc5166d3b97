// Small all-gathers and sums: every rank stores what it has straight into its peers' memory, and takes theirs from its
// own.
//
// Tiling: a CTA of 256 threads carries 4 KB to one peer and takes as much from it. Rounds (blockIdx.y) pair the ranks:
// in round y rank r meets rank y - r (modulo the size), which meets it there too, so that CTAs that wait for each other
// have the same number and start in the same order, however few fit the GPU; in one round a rank meets itself. (A sum's
// CTA takes all rounds.) A thread carries 16 bytes as two pairs of pairs (4 bytes, count): a 64-bit word is read as it
// was written, so data that stand beside the count that is waited for are those of this exchange. No fence, no flag
// behind the data, no CTA waits for another of its own GPU. Bytes: twice the message over the link, and once more from
// L2. Bound: a store's way to the peer and a load from L2, some 2 us with the launch; from some 100 KB on the link (450
// GB/s a direction on NVLink 4).
//
// Counts: a CTA counts the exchanges that it took part in, in device memory, so that a replayed graph goes on counting;
// the peer's CTA has counted the same ones. Two slots, by the count's last bit, are enough: who pushes exchange n + 1
// is through with n and so has seen the peer's part of it; the peer then was through with n - 1, which lay in the same
// slot, for a communicator's kernels run one after the other. A count comes again after 2^32 exchanges, which matters
// only to a line of whose CTA's exchanges all but the first and the last were too short for it.

#include <algorithm>

#include "kernels/cuda/exchange/peer_exchange.hpp"
#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

namespace {

constexpr int threads = static_cast<int>(exchange_threads);

struct Exchange {
  PeerGroup group;
  const char* send;
  char* recv;
  std::size_t bytes, slot;  // of a rank; of a round
  int most_ctas;            // of a round
};

// A thread's two pairs of pairs: neighbours' lie side by side.
__device__ __forceinline__ std::byte* pairs_of(std::byte* slot, std::size_t item, int half) {
  return slot + item / 32 * 1024 + half * 512 + item % 32 * 16;
}

__device__ __forceinline__ void poke(std::byte* to, std::uint32_t a, std::uint32_t b, std::uint32_t count) {
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

__device__ __forceinline__ int round_of(const Exchange& e, int peer) {
  const int sum = e.group.rank + peer;
  return sum < e.group.size ? sum : sum - e.group.size;
}

// Exchanges of this CTA with the peer's.
__device__ __forceinline__ std::uint32_t& counted(const Exchange& e, int peer) {
  auto* counts = reinterpret_cast<std::uint32_t*>(e.group.memory[e.group.rank] + counts_at);
  return counts[round_of(e, peer) * e.most_ctas + blockIdx.x];
}

// Where one of the two finds what the other pushed.
__device__ __forceinline__ std::byte* slot_of(const Exchange& e, int whose, int peer, std::uint32_t count) {
  return e.group.memory[whose] + (count % 2 * e.group.size + round_of(e, peer)) * e.slot;
}

__device__ __forceinline__ void push(const Exchange& e, int peer, std::size_t item, uint4 x) {
  const std::uint32_t count = counted(e, peer) + 1;
  std::byte* slot = slot_of(e, peer, peer, count);
  poke(pairs_of(slot, item, 0), x.x, x.y, count);
  poke(pairs_of(slot, item, 1), x.z, x.w, count);
}

// Waits for the peer; a watchdog, not this kernel, says when it has waited for too long.
__device__ __forceinline__ uint4 take(const Exchange& e, int peer, std::size_t item) {
  const std::uint32_t count = counted(e, peer) + 1;
  std::byte* slot = slot_of(e, e.group.rank, peer, count);
  for (unsigned looks = 1;; ++looks) {
    const ulonglong2 x = peek(pairs_of(slot, item, 0)), y = peek(pairs_of(slot, item, 1));
    const auto fresh = [&](unsigned long long pair) { return static_cast<std::uint32_t>(pair >> 32) == count; };
    if ((fresh(x.x) && fresh(x.y) && fresh(y.x) && fresh(y.y)) || (looks % 4096 == 0 && gave_up(e.group.given_up)))
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

__global__ void __launch_bounds__(threads) gather_kernel(const __grid_constant__ Exchange e) {
  griddep_wait();
  const int round = blockIdx.y,
            peer = round < e.group.rank ? round - e.group.rank + e.group.size : round - e.group.rank;
  const std::size_t item = std::size_t{blockIdx.x} * threads + threadIdx.x, at = item * line_data, here = e.bytes - at;
  char* to = e.recv + peer * e.bytes + at;
  if (peer == e.group.rank) {
    if (at < e.bytes && to != e.send + at) store(to, load(e.send + at, here), here);
    return;
  }
  if (at < e.bytes) {
    push(e, peer, item, load(e.send + at, here));
    store(to, take(e, peer, item), here);
  }
  __syncthreads();  // all have read the count
  if (threadIdx.x == 0) ++counted(e, peer);
}

// A CTA a piece, all rounds: added by rising rank, as on the host, the same bits on every rank.
__global__ void __launch_bounds__(threads) sum_kernel(const __grid_constant__ Exchange e) {
  griddep_wait();
  const int rank = e.group.rank, size = e.group.size;
  const std::size_t item = std::size_t{blockIdx.x} * threads + threadIdx.x, at = item * line_data, here = e.bytes - at;
  if (at < e.bytes) {
    const uint4 own = load(e.send + at, here);
    for (int i = 1; i < size; ++i) push(e, rank + i < size ? rank + i : rank + i - size, item, own);
    float sum[4];
    for (int r = 0; r < size; ++r) {
      const uint4 x = r == rank ? own : take(e, r, item);
      const float term[4] = {__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z), __uint_as_float(x.w)};
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = r == 0 ? term[i] : sum[i] + term[i];
    }
    store(
        e.recv + at,
        make_uint4(__float_as_uint(sum[0]), __float_as_uint(sum[1]), __float_as_uint(sum[2]), __float_as_uint(sum[3])),
        here);
  }
  __syncthreads();
  const int peer = static_cast<int>(threadIdx.x);
  if (peer < size && peer != rank) ++counted(e, peer);
}

void launch(void (*kernel)(Exchange), unsigned rounds, const PeerGroup& group, const void* send, void* recv,
            std::size_t bytes, Stream* stream) {
  const std::size_t most = most_exchanged(group.size);
  if (bytes > most)
    throw InternalError("peers exchange " + std::to_string(bytes) + " bytes a rank (there is room for " +
                        std::to_string(most) + ")");
  const dim3 grid(static_cast<unsigned>((bytes + cta_data - 1) / cta_data), rounds);
  launch_pdl(kernel, grid, threads, 0, stream, 1,
             Exchange{group, static_cast<const char*>(send), static_cast<char*>(recv), bytes, 2 * most,
                      static_cast<int>(most / cta_data)});
}

}  // namespace

void peer_gather(const PeerGroup& group, const void* send, void* recv, std::size_t bytes, Stream* stream) {
  launch(gather_kernel, static_cast<unsigned>(group.size), group, send, recv, bytes, stream);
}

void peer_sum(const PeerGroup& group, float* data, std::size_t count, Stream* stream) {
  launch(sum_kernel, 1, group, data, data, count * sizeof(float), stream);
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
