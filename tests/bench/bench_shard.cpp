// One rank's part of a sharded decode step, attention only, without the exchanges: microseconds by layout, stage by
// stage and in the phases of ShardedAttention (one rank: fused), attend_cmp and each of those phases by itself, and the
// floor of attend_cmp's bytes at 4.3 TB/s.
//
// The data of the other ranks are written once beforehand, as copies of this rank's data, so that the launches do all
// their work on realistic values. Graphs of 16 steps rotate over enough sets of caches that the L2 holds nothing of a
// set when it is used again; medians of replays.
//
// Usage: bench_shard [batch context heads kv]   those rows only; 0: any
//
// On several ranks, each on a GPU of its own: the step in one launch, as it is and without its exchanges, where every
// rank attends the best blocks of its own. What exactness costs is the difference; turns of both, medians.
// Usage: mpirun -n N bench_shard [batch context heads kv]   the rows with kv = N

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "comm/collectives/communicator.hpp"
#include "gpu/step_args.hpp"
#include "kernels/cuda/runtime/cuda.hpp"
#include "kernels/shared/random.hpp"

using namespace nsa;

namespace {

constexpr double floor_rate = 4.3e12, cold_bytes = 200e6;
constexpr int replays = 15;

struct Row {
  int batch;
  std::int64_t context;
  int heads, kv;
};
constexpr Row table[] = {{8, 1048576, 1, 1}, {8, 1048576, 4, 1}, {8, 1048576, 1, 2}, {8, 1048576, 2, 2},
                         {8, 1048576, 4, 2}, {8, 65536, 1, 1},   {8, 65536, 1, 2},   {8, 65536, 2, 2},
                         {8, 65536, 4, 2},   {1, 65536, 1, 1},   {1, 65536, 1, 2},   {32, 65536, 1, 2},
                         {1, 1048576, 1, 2}};

struct Caches {
  KvView k[branches], v[branches];
};

class RankStep {
 public:
  RankStep(const Backend& backend, const Row& row, int kv_rank = 0);
  void stages(const Caches& c);
  void fused(const Caches& c);
  void attend_cmp(const Caches& c) { attend(cmp, c); }
  void local(const Caches& c) { b.kernels->sharded_attention.local_attention(shard_args(c), stream); }
  void rank(const Caches& c) { b.kernels->rank(rank_args(c, kv > 1), stream); }  // after local()
  void normalise(const Caches& c) { b.kernels->sharded_attention.normalise_partials(shard_args(c), stream); }
  void select(const Caches& c) {
    if (kv > 1) b.kernels->select(step(c).select_args(), stream);
  }
  void attend_sel(const Caches& c) {
    AttendArgs a = step(c).attend_args(sel);
    if (kv > 1) a.out = gated_partial_sel(partials, s, tile.rows());
    b.kernels->attend[sel][0].run(a, stream);
  }
  void combine(const Caches& c) {
    if (kv > 1)
      b.kernels->sharded_attention.merge_ranks(shard_args(c), stream);
    else
      b.kernels->combine(step(c).combine_args(), stream);
  }
  void one_launch(const Caches& c, const PeerMemory* peers, bool exchanges) {
    AttentionArgs args = step(c).attention_args();
    args.rank.candidates = nullptr, args.rank.selected = selected;
    test::run_fused<ShardedStepArgs>(b.kernels->sharded_step, {args, peers, exchanges}, stream);
  }
  double measure(const std::function<void(RankStep&, const Caches&)>& step);
  double cmp_bytes = 0;

 private:
  RowMap map(std::int64_t chunk, int halo) const;
  Caches make_caches(int number);
  test::StepMemory step(const Caches& c) const;
  void attend(Branch branch, const Caches& c) const {
    b.kernels->attend[branch][0].run(step(c).attend_args(branch), stream);
  }
  RankArgs rank_args(const Caches& c, bool local_attention) const;
  ShardedAttentionArgs shard_args(const Caches& c) const;

  const Backend& b;
  test::WorkMemory memory;
  LayerShape s;
  QueryTile tile;
  int kv, kv_rank;
  std::int64_t tokens, compressed;
  std::vector<Caches> sets;
  void *q, *scores, *scratch, *o;
  float *gate, *lse, *partials;
  Candidate* candidates;
  std::int32_t* selected;
  std::int64_t* reads;
  std::size_t scratch_bytes;
  Stream* stream;
};

RowMap RankStep::map(std::int64_t chunk, int halo) const {
  RowMap m;
  if (kv == 1) return m;
  m.chunk = chunk, m.stride = chunk + halo, m.halo = halo, m.kv = kv, m.rank = kv_rank;
  return m;
}

Caches RankStep::make_caches(int number) {
  Caches c;
  const int planes = tile.batches * s.groups;
  const std::int64_t chunk = 16 * s.rules.l_sel;
  RowMap window;
  window.ring = s.rules.w;
  window.slot_begin = kv_rank * s.rules.w / kv, window.slot_end = (kv_rank + 1) * s.rules.w / kv;
  const RowMap maps[branches] = {map(s.lse.segment, s.rules.l / s.rules.d - 1), map(chunk, 0), window};
  const std::int64_t counts[branches] = {compressed, tokens, tokens};
  for (int branch = 0; branch < branches; ++branch)
    for (KvView* view : {&c.k[branch], &c.v[branch]}) {
      const RowMap& m = maps[branch];
      const std::int64_t rows = m.ring > 0 ? m.ring
                                : kv == 1  ? counts[branch]
                                           : owned_chunks(m, counts[branch] + m.halo, kv_rank) * m.stride;
      view->map = m;
      view->width = s.d_k;
      view->plane_stride = rows * view->width;
      view->data = memory.make(planes * view->plane_stride * 2);
      b.device->fill(view->data, 0, static_cast<std::size_t>(planes * view->plane_stride * 2), stream);
      const std::string name = std::to_string(number) + branch_names[branch] + (view == &c.k[branch] ? "k" : "v");
      b.kernels->fill_rows({s.dtype, *view, tile.batches, s.groups, 0, 0, counts[branch], tensor_key(1, name.c_str())},
                           stream);
    }
  return c;
}

RankStep::RankStep(const Backend& backend, const Row& row, int rank)
    : b(backend), memory{backend, {}, {}}, kv(row.kv), kv_rank(rank), tokens(row.context) {
  memory.buffers.reserve(4096);
  stream = b.device->create_stream();
  s.groups = 4 / row.heads;
  s.heads_per_group = 16;
  s.d_k = s.d_v = 128;
  s.dtype = DType::bf16;
  s.lse.segment = 16 * s.rules.l_sel / s.rules.d;
  const std::int64_t t = tokens - 1, rows = row.batch, planes = rows * s.groups;
  compressed = compressed_tokens(s.rules, t);
  auto* position = memory.make<std::int64_t>(8);
  b.device->copy(position, &t, 8, stream);
  b.device->synchronize(stream);
  tile = {0, row.batch, 1, position, tokens};
  cmp_bytes = static_cast<double>(planes) * compressed / kv * 512;
  const int count = std::clamp(static_cast<int>(cold_bytes / cmp_bytes) + 1, 1, 16);
  for (int i = 0; i < count; ++i) sets.push_back(make_caches(i));
  const auto floats = [&](std::int64_t n) {
    auto* to = memory.make<float>(n * 4);
    b.device->fill(to, 0, static_cast<std::size_t>(n * 4), stream);
    return to;
  };
  KvView queries;
  queries.width = s.heads() * s.d_k;
  queries.data = q = memory.make(rows * queries.width * 2);
  b.kernels->fill_rows({s.dtype, queries, 1, 1, 0, 0, rows, tensor_key(1, "q"), 2.0f}, stream);
  gate = floats(planes * 3);
  b.device->fill(gate, 0x3E, planes * 3 * 4, stream);
  lse = floats((s.lse.buckets + kv) * rows * s.heads() * 2);
  partials = floats(kv * partial_floats(s, rows));
  candidates = memory.make<Candidate>(kv * planes * s.rules.n_sel * 8);
  b.device->fill(candidates, 0xFF, kv * planes * s.rules.n_sel * 8, stream);
  selected = memory.make<std::int32_t>(planes * s.rules.n_sel * 4);
  b.device->fill(selected, 0, planes * s.rules.n_sel * 4, stream);
  reads = memory.make<std::int64_t>(branches * planes * 8);
  o = memory.make(rows * s.heads() * s.d_v * 2);
  scores = memory.make(
      static_cast<std::int64_t>(b.kernels->score_bytes(s, tile, sets[0].k[cmp].plane_stride / sets[0].k[cmp].width)));
  scratch_bytes = b.kernels->scratch_bytes(s, tile, {});
  scratch = memory.make(static_cast<std::int64_t>(scratch_bytes));
  b.device->synchronize(stream);
}

test::StepMemory RankStep::step(const Caches& c) const {
  test::StepMemory m{.stage = {s, tile, {}, scratch, scratch_bytes}};
  m.q = q;
  std::copy_n(c.k, branches, m.k);
  std::copy_n(c.v, branches, m.v);
  m.gate = gate;
  m.partials = partials, m.lse = lse;
  m.scores = scores, m.o = o;
  m.reads = reads, m.selected = selected;
  m.candidates = candidates, m.ranks = kv;
  return m;
}

RankArgs RankStep::rank_args(const Caches& c, bool local_attention) const {
  RankArgs a = step(c).rank_args();
  a.local_attention = local_attention;
  return a;
}

ShardedAttentionArgs RankStep::shard_args(const Caches& c) const {
  ShardedAttentionArgs a;
  for (const Branch branch : {cmp, win}) a.attend[branch] = step(c).attend_args(branch);
  a.lse_all = lse;
  a.gated = partials;
  a.gated_all = partials;
  a.combine = step(c).combine_args();
  return a;
}

void RankStep::stages(const Caches& c) {
  attend(cmp, c);
  attend(win, c);
  b.kernels->rank(rank_args(c, false), stream);
  select(c);
  attend(sel, c);
  b.kernels->combine(step(c).combine_args(), stream);
}

void RankStep::fused(const Caches& c) {
  if (kv == 1) return test::run_fused(b.kernels->decode_attention, step(c).attention_args(), stream);
  local(c);
  rank(c);
  normalise(c);
  select(c);
  attend_sel(c);
  combine(c);
}

double RankStep::measure(const std::function<void(RankStep&, const Caches&)>& step) {
  struct Context {
    RankStep* rank;
    const std::function<void(RankStep&, const Caches&)>* step;
    int rounds;
  } context{this, &step, std::max(1, 16 / static_cast<int>(sets.size()))};
  step(*this, sets[0]);
  b.device->synchronize(stream);
  Graph* graph = b.device->capture(
      stream,
      [](void* c) {
        const auto* at = static_cast<const Context*>(c);
        for (int round = 0; round < at->rounds; ++round)
          for (const Caches& set : at->rank->sets) (*at->step)(*at->rank, set);
      },
      &context);
  Event *from = b.device->create_event(), *to = b.device->create_event();
  std::vector<double> seconds;
  for (int replay = 0; replay < replays + 2; ++replay) {
    b.device->record(from, stream);
    b.device->launch(graph, stream);
    b.device->record(to, stream);
    b.device->synchronize(stream);
    if (replay >= 2) seconds.push_back(b.device->elapsed(from, to) / context.rounds / static_cast<double>(sets.size()));
  }
  b.device->destroy_event(from);
  b.device->destroy_event(to);
  b.device->destroy_graph(graph);
  std::nth_element(seconds.begin(), seconds.begin() + replays / 2, seconds.end());
  return 1e6 * seconds[replays / 2];
}

struct Column {
  const char* name;
  void (RankStep::*run)(const Caches&);
  bool sharded_only;  // only where ranks share the sequences
};
constexpr Column columns[] = {{"staged", &RankStep::stages, false},  {"fused", &RankStep::fused, false},
                              {"cmp", &RankStep::attend_cmp, false}, {"local", &RankStep::local, true},
                              {"rank", &RankStep::rank, false},      {"normalise", &RankStep::normalise, true},
                              {"select", &RankStep::select, true},   {"sel", &RankStep::attend_sel, false},
                              {"combine", &RankStep::combine, false}};

bool is_wanted(const Row& row, int argc, char** argv) {
  if (argc != 5) return true;
  const std::int64_t of_row[] = {row.batch, row.context, row.heads, row.kv};
  for (int i = 0; i < 4; ++i)
    if (const std::int64_t wanted = std::atoll(argv[i + 1]); wanted != 0 && wanted != of_row[i]) return false;
  return true;
}

void bench_launch(const ControlComm& world, int argc, char** argv) {
  const Backend backend = open_cuda(world.local_rank());
  const Communicator ranks(backend, world);
  const bool prints = world.rank() == 0;
  if (prints)
    std::printf("64 heads, 4 groups, D = 128, bf16; us of one launch, slowest rank\n%13s %10s %9s %9s %9s\n",
                "batch x ctx", "heads x kv", "exact", "own", "ratio");
  for (const Row& row : table) {
    if (row.kv != world.size() || !is_wanted(row, argc, argv)) continue;
    RankStep step(backend, row, world.rank());
    std::vector<double> us[2];
    for (int turn = 0; turn < 10; ++turn) {
      world.barrier();
      const bool exact = turn % 2 == 0;
      us[turn % 2].push_back(world.max(
          step.measure([&](RankStep& of, const Caches& c) { of.one_launch(c, ranks.peer_memory(), exact); })));
    }
    for (auto& turns : us) std::sort(turns.begin(), turns.end());
    const double exact = us[0][us[0].size() / 2], own = us[1][us[1].size() / 2];
    if (prints)
      std::printf("%4d x %5lldK %6d x %d %9.1f %9.1f %9.3f\n", row.batch, static_cast<long long>(row.context / 1024),
                  row.heads, row.kv, exact, own, exact / own);
    std::fflush(stdout);
  }
}

}  // namespace

int main(int argc, char** argv) {
  MpiSession mpi(argc, argv);
  const ControlComm world = ControlComm::world();
  if (world.size() > 1) return bench_launch(world, argc, argv), 0;
  const Backend backend = open_cuda(0);
  std::printf("64 heads, 4 groups, D = 128, bf16; us of one rank, without exchanges\n%13s %10s", "batch x ctx",
              "heads x kv");
  for (const Column& column : columns) std::printf(" %9s", column.name);
  std::printf(" %9s\n", "floor");
  for (const Row& row : table) {
    if (!is_wanted(row, argc, argv)) continue;
    RankStep step(backend, row);
    std::printf("%4d x %5lldK %6d x %d", row.batch, static_cast<long long>(row.context / 1024), row.heads, row.kv);
    for (const Column& column : columns) {
      if (column.sharded_only && row.kv == 1)
        std::printf(" %9s", "-");
      else
        std::printf(" %9.1f", step.measure([&](RankStep& of, const Caches& c) { (of.*column.run)(c); }));
    }
    std::printf(" %9.1f\n", step.cmp_bytes / floor_rate * 1e6);
    std::fflush(stdout);
  }
}
