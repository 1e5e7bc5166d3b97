// Decode, attention only: microseconds per step and the ratio to the floor, by batch and context, and by stage.
//
// A graph holds `steps` steps; its replays are timed with events, and the median is divided by the steps. The steps
// rotate over enough sets of caches that the L2 holds nothing of a set when it is used again. The floor is the time to
// read the K and V bytes of a step at 4.3 TB/s (the H200's measured copy rate). Output: one line per row of the table;
// the columns after the bar are the stages, each measured by itself.
// Usage: bench_decode [batch context]   that row only, for a profiler
//        bench_decode shapes [row]      other head counts, head sizes and blocks at 16 x 64K; a row of them
//        bench_decode tokens [number]   several query tokens a step, and the ratio to one; so many of 32 x 64K only
//        bench_decode fp8 [row]         FP8 caches against bf16, by turns, at head size 128; a row of them

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iterator>
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

struct ShapeRow {
  int heads, groups, d_k, d_v, l_sel, n_sel;
};
constexpr ShapeRow shapes[] = {
    {64, 4, 128, 128, 64, 16},  {64, 4, 192, 128, 64, 16}, {64, 4, 16, 16, 64, 16},    {64, 4, 48, 48, 64, 16},
    {64, 4, 80, 80, 64, 16},    {64, 4, 96, 96, 64, 16},   {64, 4, 112, 112, 64, 16},  {64, 4, 160, 160, 64, 16},
    {64, 4, 256, 256, 64, 16},  {16, 8, 256, 256, 64, 16}, {32, 32, 96, 96, 64, 16},   {32, 32, 128, 128, 64, 16},
    {128, 4, 128, 128, 64, 16}, {64, 1, 128, 128, 64, 16}, {64, 4, 128, 128, 128, 16}, {64, 4, 128, 128, 64, 32},
    {32, 2, 128, 128, 64, 64},  {32, 8, 128, 128, 64, 16}, {64, 8, 128, 128, 64, 16},  {96, 8, 128, 128, 64, 16}};

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

// Sets of caches of so many bytes.
int sets_for(double bytes) { return std::clamp(static_cast<int>(cold_bytes / bytes) + 1, 1, 64); }

void print_shapes(const Backend& backend, int only) {
  std::printf("16 x 64K, bf16: us a step\n%8s %8s %5s %3s %8s %8s %7s\n", "H/G", "Dk Dv", "l'", "n", "us", "floor",
              "ratio");
  for (int i = 0; i < static_cast<int>(std::size(shapes)); ++i) {
    if (only >= 0 && i != only) continue;
    const ShapeRow& row = shapes[i];
    LayerShape s;
    s.groups = row.groups, s.heads_per_group = row.heads / row.groups;
    s.d_k = row.d_k, s.d_v = row.d_v;
    s.dtype = DType::bf16;
    s.rules.l_sel = row.l_sel, s.rules.n_sel = row.n_sel;
    const auto bytes = static_cast<double>(WholeDecode::bytes(s, 16, 65536));
    const WholeDecode whole(backend, s, 16, 65536, sets_for(bytes));
    const double us = measure(whole, "step") * 1e6, floor_us = bytes / floor_rate * 1e6;
    std::printf("%5d/%2d %4d %3d %5d %3d %8.1f %8.1f %6.2fx\n", row.heads, row.groups, row.d_k, row.d_v, row.l_sel,
                row.n_sel, us, floor_us, us / floor_us);
    std::fflush(stdout);
  }
}

// K and V of cmp and win once, the blocks of sel once for each query token: their q have nothing in common.
double token_bytes(const LayerShape& s, int batch, std::int64_t context, int tokens) {
  const std::int64_t chosen = std::min<std::int64_t>(context, std::int64_t{s.rules.n_sel} * s.rules.l_sel);
  return static_cast<double>(WholeDecode::bytes(s, batch, context) + std::int64_t{batch} * s.groups * (tokens - 1) *
                                                                         chosen * (s.d_k + s.d_v) *
                                                                         static_cast<std::int64_t>(size_of(s.dtype)));
}

void print_tokens(const Backend& backend, int only) {
  const std::vector<std::string> stages = {"cmp", "win", "rank", "sel", "combine"};
  std::printf("64 heads, 4 groups, Dk = Dv = 128, bf16: us a step\n%12s %7s %8s %8s %7s %7s |", "batch x ctx", "tokens",
              "us", "floor", "ratio", "to one");
  for (const std::string& name : stages) std::printf(" %8s", name.c_str());
  std::printf("\n");
  for (const auto& [batch, context] : {std::pair{32, 65536}, {1, 65536}, {8, 65536}, {128, 8192}}) {
    double one = 0;
    for (const int tokens : {1, 2, 4, 8}) {
      if (only > 0 && (tokens != only || batch != 32)) continue;
      LayerShape s;
      s.groups = 4, s.heads_per_group = 16;
      s.d_k = s.d_v = 128;
      s.dtype = DType::bf16;
      const double bytes = token_bytes(s, batch, context, tokens);
      const WholeDecode whole(backend, s, batch, context, sets_for(bytes), tokens);
      const double us = measure(whole, "step") * 1e6, floor_us = bytes / floor_rate * 1e6;
      if (tokens == 1) one = us;
      std::printf("%4d x %5lldK %7d %8.1f %8.1f %6.2fx %6.2fx |", batch, static_cast<long long>(context / 1024), tokens,
                  us, floor_us, us / floor_us, us / one);
      for (const std::string& name : stages) std::printf(" %8.1f", measure(whole, name) * 1e6);
      std::printf("\n");
      std::fflush(stdout);
    }
  }
}

// Three turns of either, and the median of each.
void print_fp8(const Backend& backend, int only) {
  constexpr struct {
    int batch;
    std::int64_t context;
    double most;  ///< of the time with bf16 caches
  } rows[] = {{1, 65536, 1.0}, {16, 65536, 0.7}, {32, 65536, 0.62}, {16, 131072, 0.62}, {8, 1 << 20, 0.60}};
  std::printf("64 heads, 4 groups, Dk = Dv = 128: us a step\n%12s %8s %8s %7s %8s %8s %8s\n", "batch x ctx", "bf16",
              "fp8", "ratio", "at most", "floor", "fp8/fl.");
  for (const auto& row : rows) {
    if (only >= 0 && &row - rows != only) continue;
    LayerShape s;
    s.groups = 4, s.heads_per_group = 16;
    s.d_k = s.d_v = 128;
    s.dtype = DType::bf16;
    LayerShape fp8 = s;
    fp8.kv_precision = fp8.cmp_precision = KvPrecision::fp8_e4m3;
    const auto of = [&](const LayerShape& shape) {
      const auto bytes = static_cast<double>(WholeDecode::bytes(shape, row.batch, row.context));
      return WholeDecode(backend, shape, row.batch, row.context, sets_for(bytes));
    };
    const WholeDecode same = of(s), quantised = of(fp8);
    std::vector<double> times[2];
    for (int turn = 0; turn < 3; ++turn) {
      times[0].push_back(measure(same, "step") * 1e6);
      times[1].push_back(measure(quantised, "step") * 1e6);
    }
    for (std::vector<double>& list : times) std::sort(list.begin(), list.end());
    const double floor_us = static_cast<double>(WholeDecode::bytes(fp8, row.batch, row.context)) / floor_rate * 1e6;
    std::printf("%4d x %5lldK %8.1f %8.1f %6.3fx %7.2fx %8.1f %7.2fx\n", row.batch,
                static_cast<long long>(row.context / 1024), times[0][1], times[1][1], times[1][1] / times[0][1],
                row.most, floor_us, times[1][1] / floor_us);
    std::fflush(stdout);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const Backend backend = open_cuda(0);
  if (argc > 1 && std::string(argv[1]) == "fp8") return print_fp8(backend, argc > 2 ? std::atoi(argv[2]) : -1), 0;
  if (argc > 1 && std::string(argv[1]) == "shapes") return print_shapes(backend, argc > 2 ? std::atoi(argv[2]) : -1), 0;
  if (argc > 1 && std::string(argv[1]) == "tokens") return print_tokens(backend, argc > 2 ? std::atoi(argv[2]) : 0), 0;
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
      const WholeDecode whole(backend, s, row.batch, row.context, sets_for(bytes));
      const double us = measure(whole, "step") * 1e6, floor_us = bytes / floor_rate * 1e6;
      std::printf("%4d x %5lldK %8.1f %8.1f %6.2fx %7.0f %7.0f |", row.batch,
                  static_cast<long long>(row.context / 1024), us, floor_us, us / floor_us, row.target_us, row.peers_us);
      for (const std::string& name : stages) std::printf(" %8.1f", measure(whole, name) * 1e6);
      std::printf("\n");
      std::fflush(stdout);
    }
  }
}
