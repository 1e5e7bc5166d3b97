// Collectives among the ranks of the world, on the backend that the environment selects: every byte of every size,
// several communicators, thousands of messages in a row, and replayed graphs. Every message has other data, so a
// message taken from an earlier exchange is detected.

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "catch.hpp"
#include "comm/collectives/communicator.hpp"
#include "kernels/cuda/exchange/peer_exchange.hpp"
#include "kernels/interface/buffer.hpp"
#include "mpi/at_end.hpp"

namespace {

using namespace nsa;

using Bytes = std::vector<unsigned char>;

struct Ranks {
  const ControlComm world = ControlComm::world();
  const Backend backend =
      open_backend(std::getenv("NSA_TEST_BACKEND") ? BackendKind::cuda : BackendKind::host, world.local_rank());
  const DeviceOps& device = *backend.device;
  const int rank = world.rank(), size = world.size();
  const Communicator one{backend, world}, other{backend, world};
  Stream *const stream = device.create_stream(), *const side_stream = device.create_stream();
  Event *const forked = device.create_event(), *const joined = device.create_event();
  MemoryAccount account;

  ~Ranks() {
    device.destroy_event(joined);
    device.destroy_event(forked);
    device.destroy_stream(side_stream);
    device.destroy_stream(stream);
  }
  Buffer make(std::size_t bytes) { return {device, account, MemoryKind::workspace, bytes}; }
  template <class T>
  void upload(const std::vector<T>& from, void* to) {
    device.copy(to, from.data(), from.size() * sizeof(T), stream);
    device.synchronize(stream);
  }
  template <class T>
  std::vector<T> download(const void* from, std::size_t count) {
    std::vector<T> to(count);
    device.copy(to.data(), from, count * sizeof(T), stream);
    device.synchronize(stream);
    return to;
  }
};

Ranks& ranks() {
  static std::unique_ptr<Ranks> open;
  if (!open) {
    open = std::make_unique<Ranks>();
    at_end([] { open.reset(); });
  }
  return *open;
}

/// Appends the data that `rank` sends in message `number`.
void append_message(Bytes& to, std::uint64_t number, int rank, std::size_t bytes) {
  std::uint64_t state = (number * 64 + static_cast<std::uint64_t>(rank) + 1) * 0x9E3779B97F4A7C15u;
  for (std::size_t i = 0; i < bytes; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    to.push_back(static_cast<unsigned char>(state >> 56));
  }
}
void append_gathered(Bytes& to, std::uint64_t number, int size, std::size_t bytes) {
  for (int rank = 0; rank < size; ++rank) append_message(to, number, rank, bytes);
}

/// Index of the first difference of two messages of equal length; -1: none.
std::ptrdiff_t first_difference(const Bytes& got, const Bytes& want) {
  const auto at = std::mismatch(got.begin(), got.end(), want.begin()).first;
  return at == got.end() ? -1 : at - got.begin();
}

/// Sizes just below and above each limit of a gather through peer memory.
std::vector<std::size_t> sizes_of_interest(int ranks) {
  std::vector<std::size_t> sizes = {1, 8, 13, 100, 4104, 66000, 540672};
  for (const std::size_t edge :
       {gpu::thread_bytes, 32 * gpu::thread_bytes, gpu::cta_bytes, gpu::max_exchange_bytes(ranks)})
    for (const std::size_t bytes : {edge - 1, edge, edge + 1, edge + gpu::thread_bytes}) sizes.push_back(bytes);
  return sizes;
}

}  // namespace

TEST_CASE("a gather writes every byte of its result and no other, for every size and alignment", "[mpi][exchange]") {
  Ranks& r = ranks();
  if (r.size == 1) return;
  constexpr std::size_t guard = 64;
  const std::vector<std::size_t> sizes = sizes_of_interest(r.size);
  const std::size_t max_bytes = *std::max_element(sizes.begin(), sizes.end());
  const Buffer send = r.make(max_bytes + guard),
               recv = r.make(static_cast<std::size_t>(r.size) * max_bytes + 2 * guard);
  std::uint64_t number = 0;
  for (const std::size_t bytes : sizes)
    for (const std::size_t off : {std::size_t{0}, std::size_t{3}})
      for (const bool in_place : {false, true}) {
        CAPTURE(bytes, off, in_place);
        Bytes own, want(off, 0xFF);
        append_message(own, ++number, r.rank, bytes);
        append_gathered(want, number, r.size, bytes);
        want.insert(want.end(), guard, 0xFF);
        r.device.fill(recv.data(), 0xFF, recv.bytes(), r.stream);
        unsigned char* to = recv.as<unsigned char>() + off;
        unsigned char* from = in_place ? to + static_cast<std::size_t>(r.rank) * bytes : send.as<unsigned char>() + off;
        r.upload(own, from);
        r.one.all_gather("test", from, to, bytes, r.stream);
        CHECK(first_difference(r.download<unsigned char>(recv.data(), want.size()), want) == -1);
        CHECK(first_difference(r.download<unsigned char>(from, bytes), own) == -1);
      }
}

TEST_CASE("a sum adds the values of all ranks, for every length and alignment", "[mpi][exchange]") {
  Ranks& r = ranks();
  if (r.size == 1) return;
  const std::size_t max_count = gpu::max_exchange_bytes(r.size) / 4;
  const Buffer data = r.make((max_count + 32) * 4);
  const auto value = [](std::size_t i, int rank, int round) {  // integers: exact in any order of summation
    return static_cast<float>(static_cast<int>((i * 37 + static_cast<std::size_t>(rank * 11 + round)) % 2001) - 1000);
  };
  int round = 0;
  for (const std::size_t count : {std::size_t{1}, std::size_t{3}, std::size_t{4}, std::size_t{1023}, std::size_t{1025},
                                  std::size_t{20480}, max_count - 1, max_count, max_count + 1})
    for (const std::size_t off : {std::size_t{0}, std::size_t{1}}) {
      CAPTURE(count, off);
      std::vector<float> own(count + 8), want(count + 8);
      ++round;
      for (std::size_t i = 0; i < own.size(); ++i) {
        own[i] = want[i] = value(i, r.rank, round);
        if (i >= count) continue;  // unchanged
        want[i] = 0;
        for (int rank = 0; rank < r.size; ++rank) want[i] += value(i, rank, round);
      }
      float* at = data.as<float>() + off;
      r.upload(own, at);
      r.one.all_reduce_sum("test", at, count, r.stream);
      CHECK((r.download<float>(at, own.size()) == want));
    }
}

TEST_CASE("thousands of gathers in a row, with all ranks on time and with one rank late", "[mpi][exchange]") {
  Ranks& r = ranks();
  if (r.size == 1) return;
  constexpr std::size_t sizes[] = {24, 4096, 20000, 64, 12288, 8, 4112};
  const bool late = GENERATE(false, true);
  CAPTURE(late);
  const std::uint64_t messages = late ? 1000 : 4000;
  Bytes own, want;
  for (std::uint64_t i = 0; i < messages; ++i) {
    append_message(own, i, r.rank, sizes[i % 7]);
    append_gathered(want, i, r.size, sizes[i % 7]);
  }
  const Buffer send = r.make(own.size()), recv = r.make(want.size());
  r.upload(own, send.data());
  std::size_t at = 0;
  for (std::uint64_t i = 0; i < messages; ++i) {
    if (late && i % 50 == 25 && static_cast<int>(i / 50) % r.size == r.rank) {
      r.device.synchronize(r.stream);
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    r.one.all_gather("test", send.as<char>() + at, recv.as<char>() + at * static_cast<std::size_t>(r.size),
                     sizes[i % 7], r.stream);
    at += sizes[i % 7];
  }
  CHECK(first_difference(r.download<unsigned char>(recv.data(), want.size()), want) == -1);
}

namespace {

constexpr std::int64_t count = 1500;  // floats: 6000 bytes, two CTAs
constexpr int steps_a_graph = 4;

/// In every step a [count] += a of the next rank. The steps alternate between two communicators and two streams, and
/// some sum a part of a over all ranks.
struct Sums {
  Ranks& r;
  Buffer a = r.make(count * 4), all = r.make(static_cast<std::size_t>(r.size) * count * 4);
  void queue() const {
    for (int step = 0; step < steps_a_graph; ++step) {
      const bool on_side_stream = step % 2 == 1;
      if (on_side_stream) r.device.record(r.forked, r.stream), r.device.wait(r.side_stream, r.forked);
      (step % 4 < 2 ? r.one : r.other)
          .all_gather("test", a.data(), all.data(), count * 4, on_side_stream ? r.side_stream : r.stream);
      if (on_side_stream) r.device.record(r.joined, r.side_stream), r.device.wait(r.stream, r.joined);
      r.backend.kernels->add(count, a.as<float>(), all.as<float>() + (r.rank + 1) % r.size * count, r.stream);
      if (step == 0) r.one.all_reduce_sum("test", a.as<float>(), 700, r.stream);
    }
  }
};

float first_value(int round, int rank, std::int64_t i) {
  return static_cast<float>((i * 31 + rank * 17 + round * 7) % 101 - 50);
}

std::vector<std::vector<float>> summed(int round, int ranks, int steps) {
  std::vector<std::vector<float>> values(static_cast<std::size_t>(ranks), std::vector<float>(count));
  for (int rank = 0; rank < ranks; ++rank)
    for (std::int64_t i = 0; i < count; ++i) values[rank][i] = first_value(round, rank, i);
  for (int step = 0; step < steps; ++step) {
    const auto before = values;
    for (int rank = 0; rank < ranks; ++rank)
      for (std::int64_t i = 0; i < count; ++i) values[rank][i] += before[(rank + 1) % ranks][i];
    if (step % steps_a_graph != 0) continue;
    for (std::int64_t i = 0; i < 700; ++i) {
      float sum = 0;
      for (int rank = 0; rank < ranks; ++rank) sum += values[rank][i];
      for (int rank = 0; rank < ranks; ++rank) values[rank][i] = sum;
    }
  }
  return values;
}

}  // namespace

TEST_CASE("gathers in a graph carry new data at every replay", "[mpi][exchange]") {
  Ranks& r = ranks();
  if (r.size == 1) return;
  Sums sums{r};
  Graph* graph = nullptr;
  if (r.device.capture)
    graph = r.device.capture(
        r.stream, [](void* self) { static_cast<const Sums*>(self)->queue(); }, &sums);
  constexpr int replays = 10;  // the sums over ranks stay exact for this many
  for (int round = 0; round < 100; ++round) {
    std::vector<float> first(count);
    for (std::int64_t i = 0; i < count; ++i) first[i] = first_value(round, r.rank, i);
    r.upload(first, sums.a.data());
    for (int replay = 0; replay < replays; ++replay) {
      if (graph)
        r.device.launch(graph, r.stream);
      else
        sums.queue();
    }
    CAPTURE(round);
    CHECK(r.download<float>(sums.a.data(), count) == summed(round, r.size, replays * steps_a_graph)[r.rank]);
  }
  if (graph) r.device.destroy_graph(graph);
}

// By hand: NSA_TEST_EXCHANGES=100000000 mpirun -n 2 mpi_tests "[many]". In an exchange a rank gets the values of the
// next rank, to which it adds 1: a word of another exchange, or a lost one, stays in the values.
TEST_CASE("exchanges replayed from a graph, as many as wanted", "[.][many]") {
  Ranks& r = ranks();
  if (r.size == 1 || !r.device.capture) return;
  constexpr std::int64_t in_graph = 100, exact = 1 << 22;  // exchanges; floats stay exact for so many
  const char* wanted = std::getenv("NSA_TEST_EXCHANGES");
  const std::int64_t exchanges = wanted ? std::atoll(wanted) : 1000000;
  struct Chain {
    Ranks& r;
    Buffer ones = r.make(count * 4), a = r.make(r.size * count * 4), b = r.make(r.size * count * 4);
    float* next(const Buffer& all) const { return all.as<float>() + (r.rank + 1) % r.size * count; }
    void queue() const {
      for (std::int64_t i = 0; i < in_graph; ++i) {
        const auto &from = i % 2 == 0 ? a : b, &to = i % 2 == 0 ? b : a;
        r.one.all_gather("test", next(from), to.data(), count * 4, r.stream);
        r.backend.kernels->add(count, next(to), ones.as<float>(), r.stream);
      }
    }
  } chain{r};
  r.upload(std::vector<float>(count, 1.0f), chain.ones.data());
  Graph* graph = r.device.capture(
      r.stream, [](void* self) { static_cast<const Chain*>(self)->queue(); }, &chain);
  for (std::int64_t done = 0; done < exchanges; done += exact) {
    const std::int64_t replays = (std::min(exact, exchanges - done) + in_graph - 1) / in_graph;
    std::vector<float> values(count), want(count);
    for (std::int64_t i = 0; i < count; ++i) {
      values[i] = first_value(0, r.rank, i);
      want[i] = first_value(0, static_cast<int>((r.rank + replays * in_graph) % r.size), i) +
                static_cast<float>(replays * in_graph);
    }
    r.upload(values, chain.next(chain.a));
    for (std::int64_t replay = 0; replay < replays; ++replay) {
      r.device.launch(graph, r.stream);
      if (replay % 64 == 63) r.device.synchronize(r.stream);
    }
    CAPTURE(done);
    CHECK(r.download<float>(chain.next(chain.a), count) == want);
  }
  r.device.destroy_graph(graph);
}

TEST_CASE("all ranks of a communicator use the same transport", "[mpi][exchange]") {
  Ranks& r = ranks();
  if (r.size == 1) return;
  const auto equal_on_all_ranks = [&](const std::string& by) { return r.world.broadcast(by) == by; };
  CHECK(equal_on_all_ranks(r.one.transport()));
  if (r.backend.kind == BackendKind::host) {
    CHECK(r.one.transport() == "MPI");
    CHECK(r.one.memory_bytes() == 0);
    return;
  }
  if (r.rank == 0) WARN("gathers over " << r.one.transport());
  const char *p2p = std::getenv("NCCL_P2P_DISABLE"), *expected = std::getenv("NSA_EXPECT_EXCHANGE");
  if (p2p && std::atoi(p2p) != 0) CHECK(r.one.transport() == "NCCL");
  if (expected) CHECK(r.one.transport() == expected);           // for a known machine: "peer memory"
  if (r.rank == r.size - 1) setenv("NSA_EXCHANGE", "nccl", 1);  // one rank suffices
  {
    const Communicator refused(r.backend, r.world);
    CHECK(refused.transport() == "NCCL");
    CHECK(refused.memory_bytes() == 0);
  }
  unsetenv("NSA_EXCHANGE");
  const Communicator reopened(r.backend, r.world);  // after another was closed
  CHECK(reopened.transport() == r.one.transport());
  CHECK((reopened.memory_bytes() > 0) == (reopened.transport() == "peer memory"));
}
