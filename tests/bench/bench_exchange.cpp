// Microseconds of an all-gather and of a sum over all ranks in a graph, by bytes per rank: NCCL compared with peer
// memory.
//
// First two columns: gathers one after the other. between kernels: the time that a gather adds to a chain of small
// kernels which each read the gathered values, as in a decode step. Medians of replays, of the slowest rank.
// Usage: mpirun -np N bench_exchange

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "comm/collectives/communicator.hpp"
#include "kernels/interface/buffer.hpp"

using namespace nsa;

namespace {

constexpr int in_graph = 50, replays = 25;

struct Bench {
  const ControlComm& world;
  const Backend& backend;
  Stream* stream;

  /// us per step of a graph.
  double measure(const std::function<void()>& step) const {
    const DeviceOps& device = *backend.device;
    const auto body = [](void* context) {
      for (int i = 0; i < in_graph; ++i) (*static_cast<const std::function<void()>*>(context))();
    };
    Graph* graph = device.capture(stream, body, const_cast<std::function<void()>*>(&step));
    Event *from = device.create_event(), *to = device.create_event();
    std::vector<double> seconds;
    for (int replay = -3; replay < replays; ++replay) {
      world.barrier();
      device.record(from, stream);
      device.launch(graph, stream);
      device.record(to, stream);
      device.synchronize(stream);
      if (replay >= 0) seconds.push_back(device.elapsed(from, to) / in_graph);
    }
    device.destroy_event(from);
    device.destroy_event(to);
    device.destroy_graph(graph);
    std::nth_element(seconds.begin(), seconds.begin() + replays / 2, seconds.end());
    return 1e6 * world.max(seconds[replays / 2]);
  }
};

}  // namespace

int main(int argc, char** argv) {
  MpiSession mpi(argc, argv);
  const ControlComm world = ControlComm::world();
  const Backend backend = open_backend(BackendKind::cuda, world.local_rank());
  const bool prints = world.rank() == 0;
  {
    const Communicator through(backend, world);
    setenv("NSA_EXCHANGE", "nccl", 1);
    const Communicator nccl(backend, world);
    const Bench bench{world, backend, backend.device->create_stream()};
    constexpr std::size_t max_bytes = std::size_t{4} << 20;
    MemoryAccount account;
    const Buffer send(*backend.device, account, MemoryKind::workspace, max_bytes),
        recv(*backend.device, account, MemoryKind::workspace, max_bytes * static_cast<std::size_t>(world.size())),
        sum(*backend.device, account, MemoryKind::workspace, max_bytes);
    backend.device->fill(sum.data(), 0, max_bytes, bench.stream);
    const auto kernel = [&] { backend.kernels->add(1024, sum.as<float>(), recv.as<float>(), bench.stream); };
    const double alone = bench.measure(kernel);
    if (prints)
      std::printf(
          "%d ranks on %s, %s against NCCL %s, us; a small kernel alone %.2f\n%9s %9s %9s   between kernels: %9s %9s   "
          "sum: %9s %9s\n",
          world.size(), backend.device->info().name.c_str(), through.transport().c_str(),
          Communicator::library_version().c_str(), alone, "bytes", "NCCL", "peers", "NCCL", "peers", "NCCL", "peers");
    for (std::size_t bytes = 1024; bytes <= max_bytes; bytes *= 2) {
      double us[6];
      int column = 0;
      for (const bool between : {false, true})
        for (const Communicator* by : {&nccl, &through}) {
          const double one = bench.measure([&] {
            by->all_gather("bench", send.data(), recv.data(), bytes, bench.stream);
            if (between) kernel();
          });
          us[column++] = between ? one - alone : one;
        }
      for (const Communicator* by : {&nccl, &through})
        us[column++] = bench.measure([&] { by->all_reduce_sum("bench", sum.as<float>(), bytes / 4, bench.stream); });
      if (prints)
        std::printf("%9zu %9.2f %9.2f   %16s %9.2f %9.2f   %4s %9.2f %9.2f\n", bytes, us[0], us[1], "", us[2], us[3],
                    "", us[4], us[5]);
      std::fflush(stdout);
    }
    backend.device->destroy_stream(bench.stream);
  }
}
