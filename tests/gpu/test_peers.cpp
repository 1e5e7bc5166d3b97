// Gathers and sums through peers' memory, all ranks on one GPU, a stream each: more ranks than a machine may have GPUs.
// tests/mpi/test_exchange.cpp tests exchanges between processes.

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "catch.hpp"
#include "kernels/cuda/exchange/peer_exchange.hpp"
#include "kernels/cuda/runtime/cuda.hpp"
#include "kernels/interface/buffer.hpp"
#include "kernels/shared/random.hpp"

namespace {

using namespace nsa;

using Bytes = std::vector<unsigned char>;

/// Ranks that access each other's memory, and the abort flag of their kernels.
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

unsigned char byte_of(std::size_t message, int rank, std::size_t i) {
  return static_cast<unsigned char>(
      (message * 193 + static_cast<std::size_t>(rank) * 71 + i * 7 + (i >> 8)) * 2654435761u >> 13);
}

}  // namespace

TEST_CASE("ranks gather through peer memory, several ranks at a time and repeatedly", "[gpu][peers]") {
  constexpr std::size_t sizes[] = {24, 4096, 20000, 64, 9, 12288, 4112}, messages = 700;
  const int ranks = GENERATE(2, 3, 4, 5, 6);
  CAPTURE(ranks);
  Group g(ranks);
  const Alarm alarm(std::chrono::seconds(20), g.abort_flag);
  std::vector<Bytes> own(static_cast<std::size_t>(ranks));
  Bytes want;
  for (std::size_t m = 0; m < messages; ++m)
    for (int rank = 0; rank < ranks; ++rank)
      for (std::size_t i = 0; i < sizes[m % 7]; ++i) {
        own[static_cast<std::size_t>(rank)].push_back(byte_of(m, rank, i));
        want.push_back(byte_of(m, rank, i));
      }
  std::vector<Buffer> send, recv;
  for (const Bytes& bytes : own) {
    send.push_back(g.make(bytes.size()));
    recv.push_back(g.make(want.size()));
    g.device.copy(send.back().data(), bytes.data(), bytes.size(), nullptr);
  }
  g.device.synchronize(nullptr);
  std::size_t at = 0;
  for (std::size_t m = 0; m < messages; at += sizes[m++ % 7])
    for (int i = 0; i < ranks; ++i) {
      const std::size_t rank = (static_cast<std::size_t>(i) + m) % static_cast<std::size_t>(ranks);
      g.gather(static_cast<int>(rank), send[rank].as<char>() + at,
               recv[rank].as<char>() + at * static_cast<std::size_t>(ranks), sizes[m % 7]);
    }
  g.synchronize();
  REQUIRE(*g.abort_flag == 0);
  for (const Buffer& buffer : recv) {
    Bytes got(want.size());
    g.device.copy(got.data(), buffer.data(), got.size(), nullptr);
    g.device.synchronize(nullptr);
    CHECK((got == want));
  }
}

TEST_CASE("sums are added in the order of ranks, between gathers of the same ranks", "[gpu][peers]") {
  const int ranks = GENERATE(2, 3, 4, 5, 6);
  CAPTURE(ranks);
  constexpr std::size_t count = 2501, rounds = 200;  // three CTAs
  Group g(ranks);
  const Alarm alarm(std::chrono::seconds(20), g.abort_flag);
  std::vector<std::vector<float>> own(static_cast<std::size_t>(ranks));
  for (int rank = 0; rank < ranks; ++rank)
    for (std::size_t i = 0; i < rounds * count; ++i)
      own[static_cast<std::size_t>(rank)].push_back(
          synthetic_value(tensor_key(1, "sum"), static_cast<std::uint32_t>(rank), i, 0));
  std::vector<float> want = own[0];
  for (std::size_t rank = 1; rank < own.size(); ++rank)
    for (std::size_t i = 0; i < want.size(); ++i) want[i] += own[rank][i];
  std::vector<Buffer> data, all;
  for (const std::vector<float>& values : own) {
    data.push_back(g.make(values.size() * 4));
    all.push_back(g.make(values.size() * 4 * static_cast<std::size_t>(ranks)));
    g.device.copy(data.back().data(), values.data(), values.size() * 4, nullptr);
  }
  g.device.synchronize(nullptr);
  const auto part = [&](const std::vector<Buffer>& of, int rank, std::size_t at) {
    return of[static_cast<std::size_t>(rank)].as<float>() + at;
  };
  for (std::size_t at = 0; at < rounds * count; at += count)
    for (int rank = 0; rank < ranks; ++rank) {
      g.sum(rank, part(data, rank, at), count);
      g.gather(rank, part(data, rank, at), part(all, rank, at * static_cast<std::size_t>(ranks)), count * 4);
    }
  g.synchronize();
  REQUIRE(*g.abort_flag == 0);
  std::vector<float> gathered;
  for (std::size_t at = 0; at < want.size(); at += count)
    for (int rank = 0; rank < ranks; ++rank) gathered.insert(gathered.end(), &want[at], &want[at] + count);
  for (int rank = 0; rank < ranks; ++rank) {
    std::vector<float> got(gathered.size());
    g.device.copy(got.data(), part(all, rank, 0), got.size() * 4, nullptr);
    g.device.synchronize(nullptr);
    CHECK((got == gathered));
  }
}

TEST_CASE("the abort flag releases a rank whose peer does not arrive", "[gpu][peers]") {
  Group g(2);
  const Buffer send = g.make(8192), recv = g.make(2 * 8192);
  const auto begin = std::chrono::steady_clock::now();
  constexpr std::chrono::milliseconds time(200);
  {
    const Alarm alarm(time, g.abort_flag);
    g.gather(0, send.data(), recv.data(), 8192);
    g.synchronize();
  }
  CHECK(std::chrono::steady_clock::now() - begin >= time);  // it did wait
  CHECK(*g.abort_flag == 1);
}
