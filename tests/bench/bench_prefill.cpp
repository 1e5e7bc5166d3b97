// Prefill, attention only, batch 1: milliseconds by context and by stage, and the ratio to the floor.
//
// A run covers all tiles as lib/nsa's prefill does on one GPU: fused, and stage by stage (cmp, rank, sel, win,
// combine), tile by tile. Both are timed with events around a run, in alternating runs; the stages with events around
// each, in separate runs; medians. The floor is the time of the FLOPs of a prefill, with the scores a second time for
// rank, at 788 TFLOP/s (the H200's measured bf16 matrix product). Neighbouring rows of the synthetic q are independent,
// and so are their selections: the worst case for the selected branch.
//
// Usage: bench_prefill [tile tokens [context]]; 0: the tile of lib/nsa. NSA_ROWS=1: row by row.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "gpu/whole_prefill.hpp"
#include "kernels/cuda/runtime/cuda.hpp"

using namespace nsa;
using namespace nsa::test;

namespace {

constexpr double floor_rate = 788e12;  // FLOP/s
constexpr int runs = 7;
enum Stage { attend_cmp, rank_blocks, attend_sel, attend_win, combine_all, stages };
constexpr const char* stage_names[] = {"cmp", "rank", "sel", "win", "combine"};

struct Row {
  std::int64_t context;
  double peers_ms, dense_ms, target_ms;
};
constexpr Row table[] = {{8192, 3.6, 1.9, 1.6}, {32768, 15.4, 29.6, 9}, {65536, 38.8, 117, 20}};

double floor_seconds(const LayerShape& s, std::int64_t T) {
  double flops = 0;
  for (std::int64_t t = 0; t < T; ++t) {
    const std::int64_t n = compressed_tokens(s.rules, t),
                       blocks = std::min<std::int64_t>(s.rules.n_sel, eligible_blocks(s.rules, t));
    const std::int64_t chosen = (blocks - 1) * s.rules.l_sel + t % s.rules.l_sel + 1;
    flops += 2.0 * s.heads() *
             static_cast<double>((n + chosen + std::min<std::int64_t>(t + 1, s.rules.w)) * (s.d_k + s.d_v) + n * s.d_k);
  }
  return flops / floor_rate;
}

double median(std::vector<double> x) {
  std::nth_element(x.begin(), x.begin() + static_cast<std::ptrdiff_t>(x.size() / 2), x.end());
  return x[x.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  const Backend backend = open_cuda(0);
  const DeviceOps& device = *backend.device;
  const bool by_rows = std::getenv("NSA_ROWS") != nullptr;
  LayerShape shape;
  shape.groups = 4;
  shape.heads_per_group = 16;
  shape.d_k = shape.d_v = 128;
  shape.dtype = DType::bf16;
  std::printf("64 heads, 4 groups, Dk = Dv = 128, bf16, batch 1: ms\n%8s %6s %8s %8s %7s %7s %7s %7s %7s |", "context",
              "tile", "ms", "staged", "floor", "ratio", "target", "peers", "dense");
  for (const char* name : stage_names) std::printf(" %8s", name);
  std::printf("\n");
  for (const Row& row : table) {
    if (argc > 2 && row.context != std::atoll(argv[2])) continue;
    WholePrefill bench(backend, shape, row.context, argc > 1 ? std::atoi(argv[1]) : 0, by_rows);
    const int repeats = by_rows ? 2 : runs;
    const auto tiles = static_cast<std::size_t>((row.context + bench.widest.tokens - 1) / bench.widest.tokens);
    std::vector<Event*> events(tiles * stages + 1);
    for (Event*& e : events) e = device.create_event();
    bench.run(nullptr);
    device.synchronize(bench.stream);
    std::vector<double> whole, staged, stage[stages];
    const auto time = [&](auto&& run) {
      device.record(events.front(), bench.stream);
      run();
      device.record(events.back(), bench.stream);
      return device.elapsed(events.front(), events.back()) * 1e3;
    };
    for (int i = 0; i < repeats; ++i) {
      staged.push_back(time([&] { bench.run(nullptr); }));
      whole.push_back(by_rows ? staged.back() : time([&] { bench.run_fused(); }));
    }
    for (int i = 0; i < repeats; ++i) {
      bench.run(&events);
      device.synchronize(bench.stream);
      double sum[stages] = {};
      for (std::size_t e = 0; e + 1 < events.size(); ++e)
        sum[e % stages] += device.elapsed(events[e], events[e + 1]) * 1e3;
      for (int c = 0; c < stages; ++c) stage[c].push_back(sum[c]);
    }
    const double ms = median(whole), floor_ms = floor_seconds(bench.s, row.context) * 1e3;
    std::printf("%7lldK %6d %8.2f %8.2f %7.2f %6.2fx %7.1f %7.1f %7.1f |", static_cast<long long>(row.context / 1024),
                bench.widest.tokens, ms, median(staged), floor_ms, ms / floor_ms, row.target_ms, row.peers_ms,
                row.dense_ms);
    for (const auto& x : stage) std::printf(" %8.2f", median(x));
    std::printf("\n");
    std::fflush(stdout);
    for (Event* e : events) device.destroy_event(e);
  }
}
