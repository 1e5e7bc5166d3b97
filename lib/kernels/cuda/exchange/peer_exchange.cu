// Small all-gathers and sums through peer memory: every rank stores its message directly into the memory of its peers,
// and loads theirs from its own. The protocol is that of NCCL's LL: each 64-bit word holds 4 bytes of data and a flag.
//
// Tiling: a CTA of 256 threads sends 4 KB to one peer and receives 4 KB from it. Rounds (blockIdx.y) pair the ranks: in
// round y rank r exchanges with rank y - r (modulo the size), and that rank exchanges with r in the same round. So CTAs
// that wait for each other have the same index and start in the same order, however few CTAs fit the GPU. In one round
// a rank is paired with itself. (A CTA of a sum takes all rounds.) A thread carries 16 bytes of data in four words
// (4 bytes of data, epoch), as two 16-byte vectors. A word is loaded as it was stored, so data next to the expected
// epoch belong to this exchange. The kernels need no fence, no flag after the data, and no wait for another CTA of the
// same GPU. Bytes: twice the message over the link, and once more from L2. Bound: the latency of a store to the peer
// and of a load from L2, about 2 us with the launch; from about 100 KB on the link (450 GB/s a direction on NVLink 4).
//
// Epochs: a CTA counts the exchanges that it took part in, in device memory, so that a replayed graph continues the
// count. The CTA of the peer has counted the same ones. Two slots, selected by the lowest bit of the epoch, are
// enough: a rank that sends exchange n + 1 has completed n and so has received the peer's part of n. The peer had then
// completed n - 1, which used the same slot, because the kernels of a communicator run one after the other. An epoch
// repeats after 2^32 exchanges. This affects only a word that all exchanges of its CTA but the first and the last were
// too short to reach.

#include <algorithm>

#include "kernels/cuda/exchange/ll_words.cuh"
#include "kernels/cuda/exchange/peer_exchange.hpp"
#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

namespace {

constexpr int threads = static_cast<int>(exchange_threads);

struct ExchangeArgs {
  PeerGroup group;
  const char* send;
  char* recv;
  std::size_t bytes, slot_bytes;  // of the message of a rank; of the slot of a round
  int max_ctas;                   // of a round
};

// Address of one of the two 16-byte vectors that carry the 16 bytes `item` of a message. Neighbouring threads access
// neighbouring vectors.
__device__ __forceinline__ std::byte* vector_address(std::byte* slot, std::size_t item, int half) {
  return slot + item / 32 * 1024 + half * 512 + item % 32 * 16;
}

__device__ __forceinline__ int round_with(const ExchangeArgs& e, int peer) {
  const int sum = e.group.rank + peer;
  return sum < e.group.size ? sum : sum - e.group.size;
}

// Number of completed exchanges of this CTA with the peer's.
__device__ __forceinline__ std::uint32_t& epoch_of(const ExchangeArgs& e, int peer) {
  auto* epochs = reinterpret_cast<std::uint32_t*>(e.group.memory[e.group.rank] + epochs_offset);
  return epochs[round_with(e, peer) * e.max_ctas + blockIdx.x];
}

// Slot in the memory of `owner` for the exchange between this rank and `peer`.
__device__ __forceinline__ std::byte* slot_of(const ExchangeArgs& e, int owner, int peer, std::uint32_t epoch) {
  return e.group.memory[owner] + (epoch % 2 * e.group.size + round_with(e, peer)) * e.slot_bytes;
}

__device__ __forceinline__ void ll_send(const ExchangeArgs& e, int peer, std::size_t item, uint4 x) {
  const std::uint32_t epoch = epoch_of(e, peer) + 1;
  std::byte* slot = slot_of(e, peer, peer, epoch);
  ll_store(vector_address(slot, item, 0), x.x, x.y, epoch);
  ll_store(vector_address(slot, item, 1), x.z, x.w, epoch);
}

__device__ __forceinline__ uint4 ll_receive(const ExchangeArgs& e, int peer, std::size_t item) {
  const std::uint32_t epoch = epoch_of(e, peer) + 1;
  std::byte* slot = slot_of(e, e.group.rank, peer, epoch);
  uint2 x[2];
  ll_wait({vector_address(slot, item, 0), vector_address(slot, item, 1)}, epoch, e.group.abort_flag, x);
  return make_uint4(x[0].x, x[0].y, x[1].x, x[1].y);
}

// Loads or stores min(bytes, 16) bytes. A message may begin and end at any byte.
__device__ __forceinline__ uint4 load_bytes(const char* from, std::size_t bytes) {
  if (bytes >= thread_bytes && reinterpret_cast<std::uintptr_t>(from) % thread_bytes == 0)
    return *reinterpret_cast<const uint4*>(from);
  uint4 x = {};
#pragma unroll 1
  for (std::size_t i = 0; i < min(bytes, thread_bytes); ++i) reinterpret_cast<char*>(&x)[i] = from[i];
  return x;
}
__device__ __forceinline__ void store_bytes(char* to, uint4 x, std::size_t bytes) {
  if (bytes >= thread_bytes && reinterpret_cast<std::uintptr_t>(to) % thread_bytes == 0) {
    *reinterpret_cast<uint4*>(to) = x;
    return;
  }
#pragma unroll 1
  for (std::size_t i = 0; i < min(bytes, thread_bytes); ++i) to[i] = reinterpret_cast<const char*>(&x)[i];
}

__global__ void __launch_bounds__(threads) all_gather_kernel(const __grid_constant__ ExchangeArgs e) {
  griddep_wait();
  const int round = blockIdx.y,
            peer = round < e.group.rank ? round - e.group.rank + e.group.size : round - e.group.rank;
  const std::size_t item = std::size_t{blockIdx.x} * threads + threadIdx.x, offset = item * thread_bytes,
                    remaining = e.bytes - offset;
  char* to = e.recv + peer * e.bytes + offset;
  if (peer == e.group.rank) {
    if (offset < e.bytes && to != e.send + offset) store_bytes(to, load_bytes(e.send + offset, remaining), remaining);
    return;
  }
  if (offset < e.bytes) {
    ll_send(e, peer, item, load_bytes(e.send + offset, remaining));
    store_bytes(to, ll_receive(e, peer, item), remaining);
  }
  __syncthreads();  // all threads have read the epoch
  if (threadIdx.x == 0) ++epoch_of(e, peer);
}

// A CTA takes 4 KB of all rounds. It adds by rising rank, as the host does, so all ranks get the same bits.
__global__ void __launch_bounds__(threads) all_reduce_sum_kernel(const __grid_constant__ ExchangeArgs e) {
  griddep_wait();
  const int rank = e.group.rank, size = e.group.size;
  const std::size_t item = std::size_t{blockIdx.x} * threads + threadIdx.x, offset = item * thread_bytes,
                    remaining = e.bytes - offset;
  if (offset < e.bytes) {
    const uint4 own = load_bytes(e.send + offset, remaining);
    for (int i = 1; i < size; ++i) ll_send(e, rank + i < size ? rank + i : rank + i - size, item, own);
    float sum[4];
    for (int r = 0; r < size; ++r) {
      const uint4 x = r == rank ? own : ll_receive(e, r, item);
      const float term[4] = {__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z), __uint_as_float(x.w)};
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = r == 0 ? term[i] : sum[i] + term[i];
    }
    store_bytes(
        e.recv + offset,
        make_uint4(__float_as_uint(sum[0]), __float_as_uint(sum[1]), __float_as_uint(sum[2]), __float_as_uint(sum[3])),
        remaining);
  }
  __syncthreads();
  const int peer = static_cast<int>(threadIdx.x);
  if (peer < size && peer != rank) ++epoch_of(e, peer);
}

void launch(void (*kernel)(ExchangeArgs), unsigned rounds, const PeerGroup& group, const void* send, void* recv,
            std::size_t bytes, Stream* stream) {
  const std::size_t max_bytes = max_exchange_bytes(group.size);
  if (bytes > max_bytes)
    throw InternalError("peers exchange " + std::to_string(bytes) + " bytes a rank (the buffers hold " +
                        std::to_string(max_bytes) + ")");
  const dim3 grid(static_cast<unsigned>((bytes + cta_bytes - 1) / cta_bytes), rounds);
  launch_pdl(kernel, grid, threads, 0, stream, 1,
             ExchangeArgs{group, static_cast<const char*>(send), static_cast<char*>(recv), bytes, 2 * max_bytes,
                          static_cast<int>(max_bytes / cta_bytes)});
}

}  // namespace

void peer_all_gather(const PeerGroup& group, const void* send, void* recv, std::size_t bytes, Stream* stream) {
  launch(all_gather_kernel, static_cast<unsigned>(group.size), group, send, recv, bytes, stream);
}

void peer_all_reduce_sum(const PeerGroup& group, float* data, std::size_t count, Stream* stream) {
  launch(all_reduce_sum_kernel, 1, group, data, data, count * sizeof(float), stream);
}

// A refusal of the driver here is not an error of the run: the caller uses NCCL instead.
bool export_memory(void* memory, IpcHandle& handle) noexcept {
  static_assert(sizeof(cudaIpcMemHandle_t) == sizeof(IpcHandle));
  const cudaError_t code = cudaIpcGetMemHandle(reinterpret_cast<cudaIpcMemHandle_t*>(handle.data()), memory);
  (void)cudaGetLastError();
  return code == cudaSuccess;
}

std::byte* import_memory(const IpcHandle& handle) noexcept {
  cudaIpcMemHandle_t ipc_handle;
  std::copy_n(handle.data(), sizeof ipc_handle, ipc_handle.reserved);
  void* memory = nullptr;
  const cudaError_t code = cudaIpcOpenMemHandle(&memory, ipc_handle, cudaIpcMemLazyEnablePeerAccess);
  (void)cudaGetLastError();
  return code == cudaSuccess ? static_cast<std::byte*>(memory) : nullptr;
}

void close_imported_memory(std::byte* memory) noexcept {
  (void)cudaDeviceSynchronize();
  (void)cudaIpcCloseMemHandle(memory);
}

int* allocate_host_flag() noexcept {
  int* flag = nullptr;
  const cudaError_t code = cudaHostAlloc(&flag, sizeof *flag, cudaHostAllocMapped);
  (void)cudaGetLastError();
  if (code != cudaSuccess) return nullptr;
  *flag = 0;
  return flag;
}

void free_host_flag(int* flag) noexcept { (void)cudaFreeHost(flag); }

}  // namespace nsa::gpu
