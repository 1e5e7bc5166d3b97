// The attention of a decode step where ranks share the sequences, with all ranks on one GPU and copies as exchanges.
// Compares the fused phases of ShardedAttention with the stages, which test_attention.cpp compares with the host.

#include <algorithm>
#include <memory>
#include <string>

#include "catch.hpp"
#include "gpu/mirrored.hpp"

using namespace nsa;
using namespace nsa::test;

namespace {

struct Case {
  DType type = DType::bf16;
  int groups = 1, h = 16, d_k = 128, d_v = 128;
  std::int32_t batch = 1;
  std::int64_t position = 0;
  int chunk_blocks = 2;
  BlockRules rules = {};
};

LayerShape shape_of(const Case& c) {
  LayerShape s;
  s.rules = c.rules;
  s.groups = c.groups;
  s.heads_per_group = c.h;
  s.d_k = c.d_k;
  s.d_v = c.d_v;
  s.dtype = c.type;
  s.lse.segment = c.chunk_blocks * s.rules.l_sel / s.rules.d;
  return s;
}

// The caches of one rank, and the results of a step on it.
struct Rank {
  std::unique_ptr<MirroredKv> k[branches], v[branches];
};
struct RankResults {
  std::unique_ptr<MirroredBuffer> scores, scratch, lse, candidates, selected, partials, reads;
};

class Shards {
 public:
  Shards(const Case& c, int kv);
  /// Both fill the results of the ranks, and o.
  void staged(int leave_out = -1);
  void sharded(bool gated, int leave_out = -1);

  const LayerShape s;
  const int kv;
  std::vector<RankResults> results;
  std::unique_ptr<MirroredBuffer> lse_all, candidates_all, partials_all, o;

 private:
  RowMap map(std::int64_t chunk, int halo, int rank) const;
  void start();
  StageArgs stage(int rank) const;
  AttendArgs attend_args(Branch branch, int rank, int leave_out) const;
  void attend(Branch branch, int rank, int leave_out) const;
  void rank_and_select(int rank, bool local_attention) const;
  void select(int rank) const;
  CombineArgs combine_args(int leave_out) const;
  void gather(std::unique_ptr<MirroredBuffer> RankResults::*from, const MirroredBuffer& to, std::int64_t bytes) const;

  const Backend& b = gpu();
  const Case c_;
  QueryTile tile_;
  std::int64_t rows_, cmp_rows_ = 0;
  MirroredBuffer position_, gate_;
  MirroredKv q_;
  std::vector<Rank> ranks_;
};

Shards::Shards(const Case& c, int ranks)
    : s(shape_of(c)),
      kv(ranks),
      c_(c),
      rows_(c.batch),
      position_(8),
      gate_(rows_ * s.groups * 3 * 4),
      q_(c.type, RowMap{}, 1, c.batch, s.heads() * s.d_k) {
  *position_.host<std::int64_t>() = c.position;
  position_.to_gpu();
  tile_ = {0, c.batch, 1, position_.on<std::int64_t>(b), c.position + 1};
  for (std::int64_t i = 0; i < rows_ * s.groups * 3; ++i) gate_.host<float>()[i] = 0.1f + 0.2f * (i % 4);
  gate_.to_gpu();
  q_.fill(1, 1, c.batch, "q", 2.0f);
  const BlockRules& r = s.rules;
  const std::int64_t n = compressed_tokens(r, c.position);
  for (int rank = 0; rank < kv; ++rank) {
    RowMap window;
    window.ring = r.w;
    window.slot_begin = std::int64_t{rank} * r.w / kv;
    window.slot_end = std::int64_t{rank + 1} * r.w / kv;
    const RowMap maps[branches] = {map(s.lse.segment, r.l / r.d - 1, rank), map(c.chunk_blocks * r.l_sel, 0, rank),
                                   window};
    const std::int64_t counts[branches] = {n, c.position + 1, c.position + 1};
    Rank& held = ranks_.emplace_back();
    for (int branch = 0; branch < branches; ++branch)
      for (const bool value : {false, true}) {
        auto& cache = value ? held.v[branch] : held.k[branch];
        cache = std::make_unique<MirroredKv>(c.type, maps[branch], std::int64_t{c.batch} * s.groups,
                                             std::max<std::int64_t>(counts[branch], 1), value ? s.d_v : s.d_k);
        if (value) cache->memory.clear();
        const std::string name = (value ? "v_" : "k_") + std::string(branch_names[branch]);
        if (counts[branch] > 0) cache->fill(c.batch, s.groups, counts[branch], name.c_str());
      }
    cmp_rows_ = std::max(cmp_rows_, kv == 1 ? n : MirroredKv::capacity(maps[cmp], std::max<std::int64_t>(n, 1)));
  }
}

RowMap Shards::map(std::int64_t chunk, int halo, int rank) const {
  RowMap m;
  if (kv == 1) return m;
  m.chunk = chunk;
  m.stride = chunk + halo;
  m.halo = halo;
  m.kv = kv;
  m.rank = rank;
  return m;
}

// Allocates memory filled with NaN.
void Shards::start() {
  const std::int64_t planes = std::int64_t{c_.batch} * s.groups;
  const auto make = [](std::size_t bytes) {
    return std::make_unique<MirroredBuffer>(std::max<std::int64_t>(bytes, 16));
  };
  const std::int64_t lse_bytes = lse_slots(s, kv) * rows_ * s.heads() * 8,
                     candidate_bytes = planes * s.rules.n_sel * static_cast<std::int64_t>(sizeof(Candidate));
  results.clear();
  for (int rank = 0; rank < kv; ++rank) {
    results.push_back({make(b.kernels->score_bytes(s, tile_, cmp_rows_)), make(b.kernels->scratch_bytes(s, tile_, {})),
                       make(lse_bytes), make(candidate_bytes), make(planes * s.rules.n_sel * 4),
                       make(partial_floats(s, rows_) * 4), make(branches * planes * 8)});
    results.back().reads->clear();
  }
  lse_all = make(kv * lse_bytes);
  candidates_all = make(kv * candidate_bytes);
  partials_all = make(kv * partial_floats(s, rows_) * 4);
  o = make(rows_ * s.heads() * s.d_v * static_cast<std::int64_t>(size_of(s.dtype)));
}

StageArgs Shards::stage(int rank) const {
  return {s, tile_, {}, results[rank].scratch->on<void>(b), results[rank].scratch->bytes()};
}

AttendArgs Shards::attend_args(Branch branch, int rank, int leave_out) const {
  const RankResults& to = results[rank];
  AttendArgs a{stage(rank)};
  a.q = q_.memory.on<void>(b);
  a.k = ranks_[rank].k[branch]->on(b);
  a.v = ranks_[rank].v[branch]->on(b);
  a.out = partials_at(to.partials->on<float>(b), s, rows_, branch);
  a.reads = to.reads->on<std::int64_t>(b) + branch * c_.batch * s.groups;
  a.selected = to.selected->on<std::int32_t>(b);
  a.lse = to.lse->on<float>(b);
  a.scores = to.scores->on<void>(b);
  a.scores_only = leave_out == cmp;
  return a;
}

void Shards::attend(Branch branch, int rank, int leave_out) const {
  b.kernels->attend[branch][0].run(attend_args(branch, rank, leave_out), nullptr);
}

void Shards::rank_and_select(int rank, bool local_attention) const {
  RankArgs a{stage(rank)};
  a.scores = results[rank].scores->on<void>(b);
  a.local_attention = local_attention;
  a.lse = lse_all->on<float>(b);
  a.lse_ranks = kv;
  a.cmp_map = ranks_[rank].k[cmp]->view.map;
  a.token_map = ranks_[rank].k[sel]->view.map;
  if (kv == 1)
    a.selected = results[rank].selected->on<std::int32_t>(b);
  else
    a.candidates = results[rank].candidates->on<Candidate>(b);
  b.kernels->rank(a, nullptr);
}

void Shards::select(int rank) const {
  if (kv > 1)
    b.kernels->select({stage(rank), candidates_all->on<Candidate>(b), kv, results[rank].selected->on<std::int32_t>(b)},
                      nullptr);
}

CombineArgs Shards::combine_args(int leave_out) const {
  CombineArgs a{stage(0)};
  a.partials = partials_all->on<float>(b);
  a.ranks = kv;
  a.gate = gate_.on<float>(b);
  if (leave_out >= 0) a.leave_out[leave_out] = true;
  a.o = o->on<void>(b);
  return a;
}

void Shards::gather(std::unique_ptr<MirroredBuffer> RankResults::*from, const MirroredBuffer& to,
                    std::int64_t bytes) const {
  for (int rank = 0; rank < kv; ++rank)
    b.device->copy(to.on<char>(b) + rank * bytes, (results[rank].*from)->on<void>(b), static_cast<std::size_t>(bytes),
                   nullptr);
}

void Shards::staged(int leave_out) {
  start();
  for (int rank = 0; rank < kv; ++rank) {
    attend(cmp, rank, leave_out);
    if (leave_out != win) attend(win, rank, leave_out);
  }
  gather(&RankResults::lse, *lse_all, results[0].lse->bytes());
  if (leave_out != sel) {
    for (int rank = 0; rank < kv; ++rank) rank_and_select(rank, false);
    gather(&RankResults::candidates, *candidates_all, results[0].candidates->bytes());
    for (int rank = 0; rank < kv; ++rank) select(rank), attend(sel, rank, leave_out);
  }
  gather(&RankResults::partials, *partials_all, results[0].partials->bytes());
  b.kernels->combine(combine_args(leave_out), nullptr);
  b.device->synchronize(nullptr);
}

void Shards::sharded(bool gated, int leave_out) {
  start();
  const ShardedAttention& op = b.kernels->sharded_attention;
  std::vector<ShardedAttentionArgs> args;
  for (int rank = 0; rank < kv; ++rank) {
    ShardedAttentionArgs& a = args.emplace_back();
    for (const Branch branch : {cmp, win}) a.attend[branch] = attend_args(branch, rank, leave_out);
    a.lse_all = lse_all->on<float>(b);
    if (gated) a.gated = results[rank].partials->on<float>(b);
    a.gated_all = partials_all->on<float>(b);
    a.combine = combine_args(leave_out);
    REQUIRE(op.accepts(a));
    op.local_attention(a, nullptr);
  }
  gather(&RankResults::lse, *lse_all, results[0].lse->bytes());
  if (leave_out != sel) {
    for (int rank = 0; rank < kv; ++rank) rank_and_select(rank, true);
    gather(&RankResults::candidates, *candidates_all, results[0].candidates->bytes());
  }
  for (int rank = 0; rank < kv; ++rank) {
    if (gated) op.normalise_partials(args[rank], nullptr);
    if (leave_out == sel) continue;
    select(rank);
    AttendArgs a = attend_args(sel, rank, leave_out);
    if (gated) a.out = gated_partial_sel(args[rank].gated, s, rows_);
    b.kernels->attend[sel][0].run(a, nullptr);
  }
  gather(&RankResults::partials, *partials_all,
         (gated ? gated_partial_floats(s, rows_) : partial_floats(s, rows_)) * 4);
  if (gated)
    op.merge_ranks(args[0], nullptr);
  else
    b.kernels->combine(combine_args(leave_out), nullptr);
  b.device->synchronize(nullptr);
}

// 16-bit: partials are summed in another order, and o is rounded to storage on both sides.
double tolerance(DType type) { return type == DType::f32 ? 2e-5 : type == DType::bf16 ? 8e-3 : 1.2e-3; }

std::vector<float> values(const Shards& shards) {
  const auto bytes = shards.o->from_gpu<unsigned char>();
  std::vector<float> out;
  for (std::size_t i = 0; i < bytes.size() / size_of(shards.s.dtype); ++i)
    out.push_back(value_at(shards.s.dtype, bytes.data(), static_cast<std::int64_t>(i)));
  return out;
}

// The lse buckets of all ranks in the order of a single rank.
std::vector<float> lse_buckets(const Shards& shards) {
  const auto all = shards.lse_all->from_gpu<float>();
  const std::int64_t slots = lse_slots(shards.s, shards.kv), lane = std::ssize(all) / (slots * shards.kv);
  std::vector<float> out;
  for (std::int64_t x = 0; x < shards.s.lse.buckets; ++x) {
    const auto from = all.begin() + (x % shards.kv * slots + x / shards.kv) * lane;
    out.insert(out.end(), from, from + lane);
  }
  return out;
}

template <class T>
std::vector<T> of_ranks(const Shards& shards, std::unique_ptr<MirroredBuffer> RankResults::*what) {
  std::vector<T> out;
  for (const RankResults& rank : shards.results) {
    const auto values = (rank.*what)->from_gpu<T>();
    out.insert(out.end(), values.begin(), values.end());
  }
  return out;
}

struct Answer {
  std::vector<float> lanes, o;
  std::vector<std::int32_t> selected;
  std::vector<std::int64_t> reads, candidates;
};
Answer answer(const Shards& s) {
  return {lse_buckets(s), values(s), of_ranks<std::int32_t>(s, &RankResults::selected),
          of_ranks<std::int64_t>(s, &RankResults::reads), of_ranks<std::int64_t>(s, &RankResults::candidates)};
}

void compare(const Answer& got, const Answer& want, DType type, int leave_out) {
  CHECK(got.lanes == want.lanes);
  CHECK(got.reads == want.reads);
  if (leave_out != sel) {
    CHECK(got.candidates == want.candidates);
    CHECK(got.selected == want.selected);
  }
  CHECK(relative_error(got.o, want.o) < tolerance(type));
}

void check(const Case& c, std::initializer_list<int> grid, std::initializer_list<int> leave_outs = {-1}) {
  INFO(name_of(c.type) << " groups=" << c.groups << " h=" << c.h << " Dk=" << c.d_k << " Dv=" << c.d_v
                       << " batch=" << c.batch << " position=" << c.position);
  Shards whole(c, 1);
  whole.staged();
  const Answer one = answer(whole);
  for (const int kv : grid)
    for (const int leave_out : leave_outs) {
      INFO("kv=" << kv << ", without branch " << leave_out);
      Shards shards(c, kv);
      shards.staged(leave_out);
      const Answer staged = answer(shards);
      CHECK(staged.lanes == one.lanes);
      if (leave_out != sel)
        CHECK(std::vector(staged.selected.begin(), staged.selected.begin() + std::ssize(one.selected)) == one.selected);
      if (leave_out < 0) CHECK(relative_error(staged.o, one.o) < tolerance(c.type));
      for (const bool gated : {true, false}) {
        INFO((gated ? "gated partials" : "ordinary partials"));
        shards.sharded(gated, leave_out);
        compare(answer(shards), staged, c.type, leave_out);
      }
    }
}

}  // namespace

TEST_CASE("a fused sharded step equals its stages", "[shards]") {
  for (const DType type : {DType::bf16, DType::f32})
    for (const std::int64_t position : {0, 20, 130, 1023, 1040, 5000})
      for (const int chunk_blocks : {2, 8}) check({type, 1, 16, 128, 128, 2, position, chunk_blocks}, {2, 3, 8});
}

TEST_CASE("a sharded step of other head counts and sizes, and without a branch", "[shards]") {
  for (const auto& [type, h, d_k, d_v] : {std::tuple{DType::bf16, 5, 64, 64},
                                          {DType::f32, 5, 64, 64},
                                          {DType::f16, 20, 128, 128},
                                          {DType::f16, 16, 192, 128},
                                          {DType::f32, 1, 128, 128}})
    for (const int chunk_blocks : {2, 16})
      check({type, 2, h, d_k, d_v, 3, 2333, chunk_blocks}, {2, 4}, {-1, cmp, sel, win});
}

// Many splits per work item, and work items of more tiles than the last CTA merges: a separate launch merges the
// partials. In a layout of short work items the last CTA forms the lse buckets.
TEST_CASE("long work items are split into many and select the same blocks", "[shards]") {
  check({DType::bf16, 1, 4, 64, 64, 1, 40000, 16}, {2, 4});
  check({DType::bf16, 2, 16, 64, 64, 1, 300000, 16}, {2, 8});
  check({DType::f32, 1, 4, 64, 64, 1, 300000, 4}, {2, 3});
}

// Halos of no, one or several rows; chunks that end within a sector of scores; a sequence that ends with a chunk, so
// that one rank has the halo of the next chunk and no token of it.
TEST_CASE("a sharded step of other block geometries", "[shards]") {
  for (const DType type : {DType::bf16, DType::f32})
    for (const BlockRules& rules : {BlockRules{32, 32, 64, 8, 1, 1, 128},
                                    {8, 4, 32, 6, 2, 2, 4096},
                                    {64, 16, 64, 16, 1, 2, 128},
                                    {32, 16, 48, 5, 1, 2, 512},
                                    {4, 1, 8, 40, 1, 2, 64}})
      for (const std::int64_t position : {100, 1030, 2063})
        check({type, 1, 16, 128, 128, 2, position, 3, rules}, {2, 4});
  for (const std::int64_t position : {1024 * 2 + 15, 1024 * 2 + 31, 1024 * 3 + 15})
    check({DType::bf16, 1, 16, 128, 128, 1, position, 16}, {2, 4});
  // Blocks scored by tile, by sums of the KV mainloop and, because so many are chosen, by raw scores.
  for (const DType type : {DType::bf16, DType::f32})
    for (const BlockRules& rules : {BlockRules{8, 4, 16, 12, 0, 1, 128}, {32, 16, 64, 20, 1, 2, 512}})
      for (const std::int64_t position : {511, 1039, 2063, 9000})
        check({type, 2, 7, 64, 64, 2, position, 8, rules}, {2, 4});
}

TEST_CASE("a sharded step gives the same bits every time", "[shards][repeats]") {
  Shards shards({DType::bf16, 2, 16, 128, 128, 1, 40000, 16}, 2);
  shards.sharded(true);
  const Answer first = answer(shards);
  int differ = 0;
  for (int i = 0; i < 200; ++i) {
    shards.sharded(true);
    const Answer again = answer(shards);
    differ += again.lanes != first.lanes || again.candidates != first.candidates || again.o != first.o;
  }
  CHECK(differ == 0);
}

TEST_CASE("a small sharded step", "[shards][small]") {
  check({DType::bf16, 1, 4, 64, 64, 1, 700}, {2});
  check({DType::bf16, 1, 4, 64, 64, 1, 2100, 8}, {2});
  check({DType::bf16, 1, 4, 64, 64, 1, 20000, 4}, {2});
}
