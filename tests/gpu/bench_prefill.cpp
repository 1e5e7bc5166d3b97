// Prefill, attention only, batch 1: milliseconds by context and by stage, and the ratio to the floor.
//
// A run goes over all tiles as lib/nsa's prefill does on one GPU: at once, and stage by stage (cmp, rank, sel, win,
// combine), tile by tile. Both are timed with events around a run, runs of the two taking turns; the stages with events
// around each (in runs of their own); medians. The floor is
// the FLOPs a prefill must do, the scores once more for rank, at 788 TFLOP/s (the H200's measured bf16 matrix product).
// Neighbouring rows of the synthetic q agree in nothing, so their choices do not either: the worst case for the
// selected branch. Usage: bench_prefill [tile tokens [context]]; 0: as lib/nsa would choose. NSA_ROWS=1: row by row.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "kernels/backend.hpp"
#include "kernels/buffer.hpp"
#include "kernels/cuda/cuda.hpp"
#include "kernels/error.hpp"
#include "kernels/random.hpp"

using namespace nsa;

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

struct Memory {
  const Backend& backend;
  MemoryAccount account;
  std::vector<Buffer> buffers;
  template <class T = void>
  T* make(std::int64_t bytes) {
    buffers.emplace_back(*backend.device, account, MemoryKind::workspace, static_cast<std::size_t>(bytes));
    return static_cast<T*>(buffers.back().data());
  }
};

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

struct Bench {
  Bench(const Backend& b, std::int64_t T, int tile_tokens, bool by_rows);
  void run(const std::vector<Event*>* events);
  void run_at_once();
  AttendArgs attend_args(Branch branch, const QueryTile& tile, std::int64_t row) const;
  RankArgs rank_args(const QueryTile& tile, std::int64_t row) const;
  CombineArgs combine_args(const QueryTile& tile, std::int64_t row) const;
  template <class Body>
  void each_tile(Body&& body) const;

  const Backend& backend;
  Memory memory;
  LayerShape s;
  std::int64_t T;
  QueryTile widest;
  KvView k[branches], v[branches];
  char *q, *o;
  float *partials, *lse, *gate;
  void *scores, *scratch;
  std::size_t scratch_bytes;
  std::int64_t *reads, *starts;
  std::int32_t* selected;
  Stream* stream;
};

Bench::Bench(const Backend& b, std::int64_t context, int tile_tokens, bool by_rows)
    : backend(b), memory{b, {}, {}}, T(context) {
  s.groups = 4;
  s.heads_per_group = 16;
  s.d_k = s.d_v = 128;
  s.dtype = DType::bf16;
  memory.buffers.reserve(64);
  const std::int64_t n = compressed_tokens(s.rules, T - 1);
  const auto fill = [&](std::int64_t rows, std::int64_t planes, int width, const char* name, float scale) {
    KvView view;
    view.width = width;
    view.plane_stride = rows * width;
    view.data = memory.make(planes * rows * width * 2);
    b.kernels->fill_rows({s.dtype, view, 1, static_cast<std::int32_t>(planes), 0, 0, rows, tensor_key(1, name), scale},
                         nullptr);
    return view;
  };
  const char* names[branches][2] = {{"k_cmp", "v_cmp"}, {"k_sel", "v_sel"}, {"k_win", "v_win"}};
  for (int c = 0; c < branches; ++c) {
    k[c] = fill(c == cmp ? n : T, s.groups, s.d_k, names[c][0], 1.0f);
    v[c] = fill(c == cmp ? n : T, s.groups, s.d_v, names[c][1], 1.0f);
  }
  q = static_cast<char*>(fill(T, 1, s.heads() * s.d_k, "q", 2.0f).data);
  widest.max_positions = T;
  widest.rescores = !by_rows && b.kernels->attend[cmp][0].rescores && b.kernels->attend[cmp][0].rescores(s);
  widest.tokens =
      static_cast<std::int32_t>(std::min<std::int64_t>(tile_tokens > 0 ? tile_tokens : b.kernels->tile_tokens, T));
  while (tile_tokens == 0 && b.kernels->score_bytes(s, widest, n) > b.kernels->tile_budget) widest.tokens /= 2;
  const std::int64_t tokens = widest.tokens;
  partials = memory.make<float>(partial_floats(s, tokens) * 4);
  lse = memory.make<float>(s.lanes * tokens * s.heads() * 8);
  gate = memory.make<float>(T * s.groups * 3 * 4);
  b.device->fill(gate, 0x3E, static_cast<std::size_t>(T * s.groups * 3 * 4), nullptr);
  scores = memory.make(static_cast<std::int64_t>(b.kernels->score_bytes(s, widest, n)));
  scratch_bytes = b.kernels->scratch_bytes(s, widest);
  scratch = memory.make(static_cast<std::int64_t>(scratch_bytes));
  o = memory.make<char>(tokens * s.heads() * s.d_v * 2);
  reads = memory.make<std::int64_t>(branches * s.groups * 8);
  selected = memory.make<std::int32_t>(tokens * s.groups * s.rules.n_sel * 4);
  std::vector<std::int64_t> first;
  for (std::int64_t t = 0; t < T; t += tokens) first.push_back(t);
  starts = memory.make<std::int64_t>(static_cast<std::int64_t>(first.size()) * 8);
  b.device->copy(starts, first.data(), first.size() * 8, nullptr);
  b.device->synchronize(nullptr);
  stream = b.device->create_stream();
}

AttendArgs Bench::attend_args(Branch branch, const QueryTile& tile, std::int64_t row) const {
  AttendArgs a;
  a.shape = s;
  a.tile = tile;
  a.q = q + row * s.heads() * s.d_k * 2;
  a.k = k[branch];
  a.v = v[branch];
  a.out = partials_at(partials, s, tile.rows(), branch);
  a.reads = reads + branch * s.groups;
  a.selected = selected;
  a.lse = lse;
  a.scores = scores;
  a.scratch = scratch;
  a.scratch_bytes = scratch_bytes;
  return a;
}

RankArgs Bench::rank_args(const QueryTile& tile, std::int64_t row) const {
  RankArgs r;
  r.shape = s;
  r.tile = tile;
  r.scores = scores;
  r.lse = lse;
  r.cmp_map = k[cmp].map;
  r.token_map = k[sel].map;
  r.q = q + row * s.heads() * s.d_k * 2;
  r.k_cmp = k[cmp];
  r.cmp_ms = partials_at(partials, s, tile.rows(), cmp).ms;
  r.selected = selected;
  r.scratch = scratch;
  r.scratch_bytes = scratch_bytes;
  return r;
}

CombineArgs Bench::combine_args(const QueryTile& tile, std::int64_t row) const {
  CombineArgs c;
  c.shape = s;
  c.tile = tile;
  c.partials = partials;
  c.gate = gate + row * s.groups * 3;
  c.o = o;
  return c;
}

template <class Body>
void Bench::each_tile(Body&& body) const {
  for (std::int64_t first = 0, i = 0; first < T; first += widest.tokens, ++i) {
    QueryTile tile = widest;
    tile.tokens = static_cast<std::int32_t>(std::min<std::int64_t>(widest.tokens, T - first));
    tile.first_position = starts + i;
    body(tile, first);
  }
}

// One prefill, stage by stage; with events, one is recorded before every stage of every tile and one at the end.
void Bench::run(const std::vector<Event*>* events) {
  std::size_t at = 0;
  const auto mark = [&] {
    if (events) backend.device->record((*events)[at++], stream);
  };
  const auto attend = [&](Branch branch, const QueryTile& tile, std::int64_t first) {
    mark();
    backend.kernels->attend[branch][0].run(attend_args(branch, tile, first), stream);
  };
  each_tile([&](const QueryTile& tile, std::int64_t first) {
    attend(cmp, tile, first);
    mark();
    backend.kernels->rank(rank_args(tile, first), stream);
    attend(sel, tile, first);
    attend(win, tile, first);
    mark();
    backend.kernels->combine(combine_args(tile, first), stream);
  });
  mark();
}

void Bench::run_at_once() {
  each_tile([&](const QueryTile& tile, std::int64_t first) {
    DecodeStepArgs a;
    for (const Branch b : {cmp, sel, win}) a.attend[b] = attend_args(b, tile, first);
    a.rank = rank_args(tile, first);
    a.combine = combine_args(tile, first);
    if (!backend.kernels->prefill_step_accepts(a)) throw InternalError("a row of the table is not taken at once");
    backend.kernels->prefill_step(a, stream);
  });
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
  std::printf("64 heads, 4 groups, Dk = Dv = 128, bf16, batch 1: ms\n%8s %6s %8s %8s %7s %7s %7s %7s %7s |", "context",
              "tile", "ms", "staged", "floor", "ratio", "target", "peers", "dense");
  for (const char* name : stage_names) std::printf(" %8s", name);
  std::printf("\n");
  for (const Row& row : table) {
    if (argc > 2 && row.context != std::atoll(argv[2])) continue;
    Bench bench(backend, row.context, argc > 1 ? std::atoi(argv[1]) : 0, by_rows);
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
      whole.push_back(by_rows ? staged.back() : time([&] { bench.run_at_once(); }));
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
    device.destroy_stream(bench.stream);
  }
}
