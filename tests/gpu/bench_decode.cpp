// Decode, attention only: microseconds a step and the ratio to the floor, by batch and context, and by stage.
//
// A graph holds `steps` steps; its replays are timed with events, and the median is divided by the steps. The steps
// rotate over so many sets of caches that what one reads has left the L2 before it comes round again. The floor is the
// K and V bytes a step must read at 4.3 TB/s (the H200's measured copy rate). Output: one line a row of the table; the
// columns behind the bar are the stages one by one, each launched alone.
// Usage: bench_decode [batch context]   one row alone, say for a profiler

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "kernels/backend.hpp"
#include "kernels/buffer.hpp"
#include "kernels/cuda/cuda.hpp"
#include "kernels/error.hpp"
#include "kernels/random.hpp"

using namespace nsa;

namespace {

constexpr double floor_rate = 4.3e12;  // bytes/s
constexpr double cold_bytes = 250e6;   // read between two uses of a set: several times the L2
constexpr int steps_at_least = 16, replays = 25;

struct Row {
  int batch;
  std::int64_t context;
  double peers_us, target_us;
};
constexpr Row table[] = {{1, 8192, 41, 10},     {1, 65536, 54, 12},  {4, 65536, 71, 20},   {16, 65536, 102, 58},
                         {32, 65536, 165, 105}, {64, 8192, 128, 78}, {16, 131072, 153, 92}};

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

KvView make_kv(Memory& memory, const LayerShape& s, std::int64_t planes, std::int64_t rows, int width, bool ring,
               const char* name) {
  KvView v;
  if (ring) v.map.ring = rows;
  v.width = width;
  v.plane_stride = rows * width;
  v.data = memory.make(planes * v.plane_stride * static_cast<std::int64_t>(size_of(s.dtype)));
  memory.backend.kernels->fill_rows(
      {s.dtype, v, static_cast<std::int32_t>(planes / s.groups), s.groups, 0, 0, rows, tensor_key(1, name), 1.0f},
      nullptr);
  return v;
}

// What one step reads and writes.
struct Set {
  KvView k[branches], v[branches];
  void* q;
};

struct Bench {
  Bench(const Backend& b, const LayerShape& shape, const Row& row);
  double measure(const std::vector<std::string>& stages);  ///< seconds a step
  void step(const Set& set, const std::vector<std::string>& stages);

  const Backend& backend;
  Memory memory;
  LayerShape s;
  QueryTile tile;
  double bytes;
  std::vector<Set> sets;
  float *partials, *lse, *gate;
  void *scores, *scratch, *o;
  std::int64_t* reads;
  std::int32_t* selected;
  std::size_t scratch_bytes;
  Stream* stream;
};

Bench::Bench(const Backend& b, const LayerShape& shape, const Row& row) : backend(b), memory{b, {}, {}}, s(shape) {
  const std::int64_t T = row.context, t = T - 1, n = compressed_tokens(s.rules, t), planes = row.batch * s.groups;
  const std::int64_t chosen = std::min<std::int64_t>(T, std::int64_t{s.rules.n_sel} * s.rules.l_sel);
  const std::int64_t size = static_cast<std::int64_t>(size_of(s.dtype));
  memory.buffers.reserve(4096);
  bytes = static_cast<double>(planes * (n + chosen + std::min<std::int64_t>(T, s.rules.w)) * (s.d_k + s.d_v) * size);
  auto* position = memory.make<std::int64_t>(8);
  b.device->copy(position, &t, 8, nullptr);
  b.device->synchronize(nullptr);
  tile = {0, row.batch, 1, position, T};
  const int count = std::clamp(static_cast<int>(cold_bytes / bytes) + 1, 1, 64);
  for (int i = 0; i < count; ++i) {
    Set set;
    const std::string name = "set" + std::to_string(i);
    const std::int64_t rows[branches] = {n, T, s.rules.w};
    for (int c = 0; c < branches; ++c) {
      set.k[c] = make_kv(memory, s, planes, rows[c], s.d_k, c == win, (name + "k" + branch_names[c]).c_str());
      set.v[c] = make_kv(memory, s, planes, rows[c], s.d_v, c == win, (name + "v" + branch_names[c]).c_str());
    }
    KvView q;
    q.width = s.heads() * s.d_k;
    q.data = set.q = memory.make(row.batch * q.width * size);
    b.kernels->fill_rows({s.dtype, q, 1, 1, 0, 0, row.batch, tensor_key(1, (name + "q").c_str()), 2.0f}, nullptr);
    sets.push_back(set);
  }
  partials = memory.make<float>(partial_floats(s, row.batch) * 4);
  lse = memory.make<float>(std::int64_t{s.lanes} * row.batch * s.heads() * 8);
  gate = memory.make<float>(planes * 3 * 4);
  b.device->fill(gate, 0x3E, planes * 3 * 4, nullptr);
  scores = memory.make(static_cast<std::int64_t>(b.kernels->score_bytes(s, tile, n)));
  scratch_bytes = b.kernels->scratch_bytes(s, tile);
  scratch = memory.make(static_cast<std::int64_t>(scratch_bytes));
  o = memory.make(row.batch * s.heads() * s.d_v * size);
  reads = memory.make<std::int64_t>(branches * planes * 8);
  selected = memory.make<std::int32_t>(planes * s.rules.n_sel * 4);
  stream = b.device->create_stream();
  b.device->synchronize(nullptr);
}

void Bench::step(const Set& set, const std::vector<std::string>& stages) {
  const auto wants = [&](const char* name) { return std::find(stages.begin(), stages.end(), name) != stages.end(); };
  const auto attend_args = [&](Branch branch) {
    AttendArgs a;
    a.shape = s;
    a.tile = tile;
    a.q = set.q;
    a.k = set.k[branch];
    a.v = set.v[branch];
    a.out = partials_at(partials, s, tile.rows(), branch);
    a.reads = reads + branch * tile.rows() * s.groups;
    a.selected = selected;
    a.lse = lse;
    a.scores = scores;
    a.scratch = scratch;
    a.scratch_bytes = scratch_bytes;
    return a;
  };
  const auto attend = [&](Branch branch) { backend.kernels->attend[branch][0].run(attend_args(branch), stream); };
  const auto rank_args = [&] {
    RankArgs a;
    a.shape = s;
    a.tile = tile;
    a.scores = scores;
    a.lse = lse;
    a.cmp_map = set.k[cmp].map;
    a.token_map = set.k[sel].map;
    a.selected = selected;
    a.scratch = scratch;
    a.scratch_bytes = scratch_bytes;
    return a;
  };
  const auto combine_args = [&] {
    CombineArgs a;
    a.shape = s;
    a.tile = tile;
    a.partials = partials;
    a.gate = gate;
    a.o = o;
    return a;
  };
  if (wants("step")) {
    DecodeStepArgs a{{attend_args(cmp), attend_args(sel), attend_args(win)}, rank_args(), combine_args()};
    if (!backend.kernels->decode_step_accepts(a)) throw InternalError("a row of the table is not taken at once");
    backend.kernels->decode_step(a, stream);
  }
  if (wants("cmp")) attend(cmp);
  if (wants("win")) attend(win);
  if (wants("rank")) backend.kernels->rank(rank_args(), stream);
  if (wants("sel")) attend(sel);
  if (wants("combine")) backend.kernels->combine(combine_args(), stream);
}

double Bench::measure(const std::vector<std::string>& stages) {
  const int rounds = std::max(1, steps_at_least / static_cast<int>(sets.size()));
  struct Context {
    Bench* bench;
    const std::vector<std::string>* stages;
    int rounds;
  } context{this, &stages, rounds};
  step(sets[0], stages);
  const DeviceOps& device = *backend.device;
  device.synchronize(stream);
  Graph* graph = device.capture(
      stream,
      [](void* c) {
        const auto* at = static_cast<const Context*>(c);
        for (int round = 0; round < at->rounds; ++round)
          for (const Set& set : at->bench->sets) at->bench->step(set, *at->stages);
      },
      &context);
  Event *from = device.create_event(), *to = device.create_event();
  std::vector<double> seconds;
  for (int replay = 0; replay < replays + 3; ++replay) {
    device.record(from, stream);
    device.launch(graph, stream);
    device.record(to, stream);
    device.synchronize(stream);
    if (replay >= 3) seconds.push_back(device.elapsed(from, to) / (rounds * static_cast<double>(sets.size())));
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
      Bench bench(backend, s, row);
      const double us = bench.measure({"step"}) * 1e6, floor_us = bench.bytes / floor_rate * 1e6;
      std::printf("%4d x %5lldK %8.1f %8.1f %6.2fx %7.0f %7.0f |", row.batch,
                  static_cast<long long>(row.context / 1024), us, floor_us, us / floor_us, row.target_us, row.peers_us);
      for (const std::string& name : stages) std::printf(" %8.1f", bench.measure({name}) * 1e6);
      std::printf("\n");
      std::fflush(stdout);
      backend.device->destroy_stream(bench.stream);
    }
  }
}
