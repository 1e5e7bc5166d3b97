#pragma once
// Ranks that access each other's memory, all on one GPU, a stream each.

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#include "kernels/cuda/exchange/peer_exchange.hpp"
#include "kernels/cuda/runtime/cuda.hpp"
#include "kernels/interface/buffer.hpp"

namespace nsa::test {

/// CUDA loads a kernel at its first launch, which waits for running kernels: here for one that waits for a peer whose
/// kernel has not been launched. So all are loaded at the start.
inline const int loads_kernels_at_start = setenv("CUDA_MODULE_LOADING", "EAGER", 1);

/// The ranks, and the abort flag of their kernels.
class Group {
 public:
  explicit Group(int ranks) : size(ranks) {
    for (int rank = 0; rank < size; ++rank) {
      streams.push_back(device.create_stream());
      memory.push_back(make(gpu::peer_memory_bytes));
      device.fill(memory.back().data(), 0, gpu::peer_memory_bytes, nullptr);
    }
    device.synchronize(nullptr);
  }
  ~Group() {
    for (Stream* stream : streams) device.destroy_stream(stream);
    gpu::free_host_flag(abort_flag);
  }
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  Buffer make(std::size_t bytes) { return {device, account, MemoryKind::workspace, bytes}; }
  gpu::PeerGroup seen_by(int rank) const {
    gpu::PeerGroup group{rank, size, {}, abort_flag};
    for (int r = 0; r < size; ++r) group.memory[r] = memory[static_cast<std::size_t>(r)].as<std::byte>();
    return group;
  }
  void gather(int rank, const void* send, void* recv, std::size_t bytes) const {
    gpu::peer_all_gather(seen_by(rank), send, recv, bytes, streams[static_cast<std::size_t>(rank)]);
  }
  void sum(int rank, float* data, std::size_t count) const {
    gpu::peer_all_reduce_sum(seen_by(rank), data, count, streams[static_cast<std::size_t>(rank)]);
  }
  void synchronize() const {
    for (Stream* stream : streams) device.synchronize(stream);
  }

  const Backend backend = open_cuda(0);
  const DeviceOps& device = *backend.device;
  MemoryAccount account;
  const int size;
  std::vector<Stream*> streams;
  std::vector<Buffer> memory;
  int* const abort_flag = gpu::allocate_host_flag();
};

/// Sets a flag if it is not destroyed within the given time.
class Alarm {
 public:
  Alarm(std::chrono::milliseconds time, int* flag)
      : thread_([this, time, flag] {
          std::unique_lock lock(mutex_);
          if (!over_.wait_for(lock, time, [this] { return stopped_; })) *static_cast<volatile int*>(flag) = 1;
        }) {}
  ~Alarm() {
    {
      const std::lock_guard lock(mutex_);
      stopped_ = true;
    }
    over_.notify_one();
    thread_.join();
  }

 private:
  std::mutex mutex_;
  std::condition_variable over_;
  bool stopped_ = false;
  std::thread thread_;  // the last member: it uses the others
};

}  // namespace nsa::test
