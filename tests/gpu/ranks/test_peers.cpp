// Gathers and sums through peers' memory, all ranks on one GPU, a stream each: more ranks than a machine may have GPUs.
// tests/mpi/test_exchange.cpp tests exchanges between processes.

#include <chrono>
#include <vector>

#include "catch.hpp"
#include "gpu/ranks/peers.hpp"
#include "kernels/shared/random.hpp"

namespace {

using namespace nsa;
using namespace nsa::test;

using Bytes = std::vector<unsigned char>;

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
