// Decode, attention only: microseconds per step and the ratio to the floor, by batch and context, and by stage.
//
// A graph holds `steps` steps; its replays are timed with events, and the median is divided by the steps. The steps
// rotate over enough sets of caches that the L2 holds nothing of a set when it is used again. The floor is the time to
// read the K and V bytes of a step at 4.3 TB/s (the H200's measured copy rate). Output: one line per row of the table;
// the columns after the bar are the stages, each measured by itself.
// Usage: bench_decode [batch context]   that row only, for a profiler

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "gpu/whole_decode.hpp"
#include "kernels/cuda/runtime/cuda.hpp"

using namespace nsa;
using nsa::test::WholeDecode;

namespace {

constexpr double floor_rate = 4.3e12;  // bytes/s
constexpr double cold_bytes = 250e6;   // read between two uses of a set: several times the L2
constexpr int min_steps = 16, replays = 25;

struct Row {
  int batch;
  std::int64_t context;
  double peers_us, target_us;
};
constexpr Row table[] = {{1, 8192, 41, 10},     {1, 65536, 54, 12},  {4, 65536, 71, 20},   {16, 65536, 102, 58},
                         {32, 65536, 165, 105}, {64, 8192, 128, 78}, {16, 131072, 153, 92}};

// Queues a step, or one of its stages.
void queue(const WholeDecode& whole, const WholeDecode::Set& set, const std::string& what) {
  what == "step" ? whole.run_fused(set) : whole.run_stage(set, what);
}

// Seconds of a step, or of one of its stages.
double measure(const WholeDecode& whole, const std::string& what) {
  const int rounds = std::max(1, min_steps / static_cast<int>(whole.sets.size()));
  struct Context {
    const WholeDecode& whole;
    const std::string& what;
    int rounds;
  } context{whole, what, rounds};
  queue(whole, whole.sets[0], what);
  const DeviceOps& device = *whole.backend.device;
  device.synchronize(whole.stream);
  Graph* graph = device.capture(
      whole.stream,
      [](void* c) {
        const auto& at = *static_cast<const Context*>(c);
        for (int round = 0; round < at.rounds; ++round)
          for (const WholeDecode::Set& set : at.whole.sets) queue(at.whole, set, at.what);
      },
      &context);
  Event *from = device.create_event(), *to = device.create_event();
  std::vector<double> seconds;
  for (int replay = 0; replay < replays + 3; ++replay) {
    device.record(from, whole.stream);
    device.launch(graph, whole.stream);
    device.record(to, whole.stream);
    device.synchronize(whole.stream);
    if (replay >= 3) seconds.push_back(device.elapsed(from, to) / (rounds * static_cast<double>(whole.sets.size())));
  }
  device.destroy_event(from);
  device.destroy_event(to);
  device.destroy_graph(graph);
  std::nth_element(seconds.begin(), seconds.begin() + replays / 2, seconds.end());
  return seconds[replays / 2];
}

}  // namespace

int main(int argc, char** argv) {
  const Backend backend = open_cuda(0);
  const std::vector<std::string> stages = {"cmp", "win", "rank", "sel", "combine"};
  for (const int d : {128, 64}) {
    std::printf("64 heads, 4 groups, Dk = Dv = %d, bf16: us a step\n%12s %8s %8s %7s %7s %7s |", d, "batch x ctx", "us",
                "floor", "ratio", "target", "peers");
    for (const std::string& name : stages) std::printf(" %8s", name.c_str());
    std::printf("\n");
    for (const Row& row : table) {
      if (argc == 3 && (row.batch != std::atoi(argv[1]) || row.context != std::atoll(argv[2]))) continue;
      LayerShape s;
      s.groups = 4;
      s.heads_per_group = 16;
      s.d_k = s.d_v = d;
      s.dtype = DType::bf16;
      const auto bytes = static_cast<double>(WholeDecode::bytes(s, row.batch, row.context));
      const WholeDecode whole(backend, s, row.batch, row.context,
                              std::clamp(static_cast<int>(cold_bytes / bytes) + 1, 1, 64));
      const double us = measure(whole, "step") * 1e6, floor_us = bytes / floor_rate * 1e6;
      std::printf("%4d x %5lldK %8.1f %8.1f %6.2fx %7.0f %7.0f |", row.batch,
                  static_cast<long long>(row.context / 1024), us, floor_us, us / floor_us, row.target_us, row.peers_us);
      for (const std::string& name : stages) std::printf(" %8.1f", measure(whole, name) * 1e6);
      std::printf("\n");
      std::fflush(stdout);
    }
  }
}
