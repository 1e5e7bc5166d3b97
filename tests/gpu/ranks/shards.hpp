#pragma once
// The attention of a decode step where ranks share the sequences, with all ranks on one GPU: stage by stage and in the
// fused phases, with copies as exchanges, and as one launch a rank.

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <string>
#include <thread>

#include "catch.hpp"
#include "gpu/mirrored.hpp"
#include "gpu/ranks/peers.hpp"

namespace nsa::test {

/// Blocks of equal scores: all of them, with queries of zero; or those in the same place of all chunks, which are on
/// different ranks.
enum class Ties { none, zero_queries, equal_chunks };

struct Case {
  DType type = DType::bf16;
  int groups = 1, h = 16, d_k = 128, d_v = 128;
  std::int32_t batch = 1;
  std::int64_t position = 0;
  int chunk_blocks = 2;
  BlockRules rules = {};
  Ties ties = Ties::none;
};

inline LayerShape shape_of(const Case& c) {
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
  std::unique_ptr<MirroredKv> k_raw, v_raw;
};
struct RankResults {
  std::unique_ptr<MirroredBuffer> scores, scratch, lse, candidates, selected, partials, reads;
  std::unique_ptr<MirroredBuffer> reads_log = {}, selected_log = {};  ///< one launch with appends_: of one step
};

class Shards {
 public:
  Shards(const Case& c, int kv);
  /// Both fill the results of the ranks, and o.
  void staged(int leave_out = -1);
  void sharded(bool gated, int leave_out = -1);
  /// The launch of each rank, or whether it is accepted, without exchanges: so no launch of one_launch() loads a
  /// kernel.
  bool try_one_launch(const Group& group, int leave_out = -1);
  /// Fills the selection, the reads and o_of. Ranks are launched from `first` on, `pause` apart. launch_ranks() does it
  /// over what is there: reads add up.
  void launch_ranks(const Group& group, int leave_out, int first, std::chrono::microseconds pause);
  void one_launch(const Group& group, int leave_out = -1, int first = 0, std::chrono::microseconds pause = {});
  /// From now on one_launch() appends new rows and the compressed token that completes with them, and logs the step.
  void append_in_launch();
  /// The same rows and token by the stages.
  void append_by_stages();
  const Rank& rank(int i) const { return ranks_[static_cast<std::size_t>(i)]; }

  const LayerShape s;
  const int kv;
  std::vector<RankResults> results;
  std::unique_ptr<MirroredBuffer> lse_all, candidates_all, partials_all, o;
  std::vector<std::unique_ptr<MirroredBuffer>> o_of;  ///< one launch: of each rank

 private:
  RowMap map(std::int64_t chunk, int halo, int rank) const;
  void make_chunks_equal(const MirroredKv& cache, std::int64_t rows) const;
  void start();
  StageArgs stage(int rank) const;
  AttendArgs attend_args(Branch branch, int rank, int leave_out) const;
  void attend(Branch branch, int rank, int leave_out) const;
  void rank_and_select(int rank, bool local_attention) const;
  void select(int rank) const;
  CombineArgs combine_args(int leave_out) const;
  AttentionArgs step_args(int rank, int leave_out) const;
  void gather(std::unique_ptr<MirroredBuffer> RankResults::*from, const MirroredBuffer& to, std::int64_t bytes) const;
  void make_new_rows();
  StepEnds ends(int rank) const;
  ShardedStepArgs launch_args(const gpu::PeerGroup& seen, int rank, int leave_out) const;

  const Backend& b = gpu();
  const Case c_;
  QueryTile tile_;
  std::int64_t rows_, cmp_rows_ = 0;
  MirroredBuffer position_, gate_;
  MirroredKv q_;
  std::vector<Rank> ranks_;
  bool appends_ = false;
  std::unique_ptr<MirroredKv> new_k_[branches], new_v_[branches];  ///< a row a plane
};

inline Shards::Shards(const Case& c, int ranks)
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
  if (c.ties == Ties::zero_queries) q_.memory.clear();
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
        if (c.ties == Ties::equal_chunks && branch == cmp && !value) make_chunks_equal(*cache, n);
      }
    cmp_rows_ = std::max(cmp_rows_, kv == 1 ? n : MirroredKv::capacity(maps[cmp], std::max<std::int64_t>(n, 1)));
  }
}

inline RowMap Shards::map(std::int64_t chunk, int halo, int rank) const {
  RowMap m;
  if (kv == 1) return m;
  m.chunk = chunk;
  m.stride = chunk + halo;
  m.halo = halo;
  m.kv = kv;
  m.rank = rank;
  return m;
}

// Every chunk of K, and its halo, becomes the first one of the sequence.
inline void Shards::make_chunks_equal(const MirroredKv& cache, std::int64_t rows) const {
  const KvView &from = ranks_[0].k[cmp]->view, &to = cache.view;
  const std::int64_t size = static_cast<std::int64_t>(size_of(c_.type)), chunk = to.map.chunk;
  const auto* first = ranks_[0].k[cmp]->memory.host<char>();
  for (std::int64_t plane = 0; plane < c_.batch * s.groups; ++plane)
    for (std::int64_t i = 0; i < owned_chunks(to.map, rows, to.map.rank); ++i) {
      const std::int64_t c = i * to.map.kv + to.map.rank;
      for (std::int64_t row = -to.map.halo; row < chunk; ++row)
        std::memcpy(cache.memory.host<char>() + offset_in_chunk(to, plane, c, c * chunk + row) * size,
                    first + offset_of(from, plane, (row + chunk) % chunk) * size,
                    static_cast<std::size_t>(to.width * size));
    }
  cache.memory.to_gpu();
}

// Allocates memory filled with NaN.
inline void Shards::start() {
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
    results.back().reads_log = make(branches * planes * 8), results.back().reads_log->clear();
    results.back().selected_log = make(planes * s.rules.n_sel * 4);
  }
  lse_all = make(kv * lse_bytes);
  candidates_all = make(kv * candidate_bytes);
  partials_all = make(kv * partial_floats(s, rows_) * 4);
  const std::int64_t o_bytes = rows_ * s.heads() * s.d_v * static_cast<std::int64_t>(size_of(s.dtype));
  o = make(o_bytes);
  o_of.clear();
  for (int rank = 0; rank < kv; ++rank) o_of.push_back(make(o_bytes));
}

inline StageArgs Shards::stage(int rank) const {
  return {s, tile_, {}, results[rank].scratch->on<void>(b), results[rank].scratch->bytes()};
}

inline AttendArgs Shards::attend_args(Branch branch, int rank, int leave_out) const {
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

inline void Shards::attend(Branch branch, int rank, int leave_out) const {
  b.kernels->attend[branch][0].run(attend_args(branch, rank, leave_out), nullptr);
}

inline void Shards::rank_and_select(int rank, bool local_attention) const {
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

inline void Shards::select(int rank) const {
  if (kv > 1)
    b.kernels->select({stage(rank), candidates_all->on<Candidate>(b), kv, results[rank].selected->on<std::int32_t>(b)},
                      nullptr);
}

inline CombineArgs Shards::combine_args(int leave_out) const {
  CombineArgs a{stage(0)};
  a.partials = partials_all->on<float>(b);
  a.ranks = kv;
  a.gate = gate_.on<float>(b);
  if (leave_out >= 0) a.leave_out[leave_out] = true;
  a.o = o->on<void>(b);
  return a;
}

inline void Shards::gather(std::unique_ptr<MirroredBuffer> RankResults::*from, const MirroredBuffer& to,
                           std::int64_t bytes) const {
  for (int rank = 0; rank < kv; ++rank)
    b.device->copy(to.on<char>(b) + rank * bytes, (results[rank].*from)->on<void>(b), static_cast<std::size_t>(bytes),
                   nullptr);
}

inline void Shards::staged(int leave_out) {
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

inline void Shards::sharded(bool gated, int leave_out) {
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

inline AttentionArgs Shards::step_args(int rank, int leave_out) const {
  AttentionArgs a;
  for (const Branch branch : {cmp, sel, win}) a.attend[branch] = attend_args(branch, rank, leave_out);
  static_cast<StageArgs&>(a.rank) = static_cast<StageArgs&>(a.combine) = stage(rank);
  a.rank.selected = results[rank].selected->on<std::int32_t>(b);
  a.combine = combine_args(leave_out);
  a.combine.o = o_of[rank]->on<void>(b);
  return a;
}

inline void Shards::make_new_rows() {
  const std::int64_t planes = rows_ * s.groups;
  RowMap ring;
  ring.ring = s.rules.l;
  for (Rank& held : ranks_)
    for (const bool value : {false, true}) {
      const char* name = value ? "v_raw" : "k_raw";
      auto& raw = value ? held.v_raw : held.k_raw;
      raw = std::make_unique<MirroredKv>(c_.type, ring, planes, s.rules.l, value ? s.d_v : s.d_k);
      raw->fill(c_.batch, s.groups, c_.position + 1, name);
    }
  for (int branch = 0; branch < branches; ++branch)
    for (const bool value : {false, true}) {
      auto& rows = value ? new_v_[branch] : new_k_[branch];
      rows = std::make_unique<MirroredKv>(c_.type, RowMap{}, planes, 1, value ? s.d_v : s.d_k);
      rows->fill(c_.batch, s.groups, 1, (std::string(value ? "new v_" : "new k_") + branch_names[branch]).c_str());
    }
}

inline StepEnds Shards::ends(int rank) const {
  const Rank& held = ranks_[static_cast<std::size_t>(rank)];
  const RankResults& to = results[static_cast<std::size_t>(rank)];
  StepEnds e;
  for (int branch = 0; branch < branches; ++branch)
    e.append[branch] = {stage(rank), new_k_[branch]->memory.on<void>(b), new_v_[branch]->memory.on<void>(b),
                        (branch == cmp ? held.k_raw : held.k[branch])->on(b),
                        (branch == cmp ? held.v_raw : held.v[branch])->on(b)};
  static_cast<StageArgs&>(e.compress) = stage(rank);
  e.compress.k_raw = held.k_raw->on(b), e.compress.v_raw = held.v_raw->on(b);
  e.compress.k_cmp = held.k[cmp]->on(b), e.compress.v_cmp = held.v[cmp]->on(b);
  e.compress.fill_halo = true;
  e.log.reads = to.reads->on<std::int64_t>(b);
  e.log.reads_log = to.reads_log->on<std::int64_t>(b);
  e.log.counters = branches * rows_ * s.groups;
  e.log.log_steps = 1;
  e.log.selected = to.selected->on<std::int32_t>(b);
  e.log.selected_log = to.selected_log->on<std::int32_t>(b);
  e.log.selected_count = rows_ * s.groups * s.rules.n_sel;
  e.first_position = c_.position;
  return e;
}

inline void Shards::append_in_launch() {
  make_new_rows();
  appends_ = true;
}

inline void Shards::append_by_stages() {
  make_new_rows();
  start();
  for (int rank = 0; rank < kv; ++rank) {
    const StepEnds e = ends(rank);
    for (const AppendArgs& append : e.append) b.kernels->append(append, nullptr);
    b.kernels->compress(e.compress, nullptr);
  }
  b.device->synchronize(nullptr);
}

inline ShardedStepArgs Shards::launch_args(const gpu::PeerGroup& seen, int rank, int leave_out) const {
  ShardedStepArgs args{step_args(rank, leave_out), reinterpret_cast<const PeerMemory*>(&seen)};
  if (appends_) args.ends = ends(rank);
  return args;
}

inline bool Shards::try_one_launch(const Group& group, int leave_out) {
  start();
  for (int rank = 0; rank < kv; ++rank) {
    const gpu::PeerGroup seen = group.seen_by(rank);
    ShardedStepArgs args = launch_args(seen, rank, leave_out);
    if (!b.kernels->sharded_step.accepts(args)) return false;
    args.exchanges = false, args.ends.reset();
    b.kernels->sharded_step.run(args, nullptr);
  }
  b.device->synchronize(nullptr);
  return true;
}

inline void Shards::one_launch(const Group& group, int leave_out, int first, std::chrono::microseconds pause) {
  start();
  b.device->synchronize(nullptr);
  launch_ranks(group, leave_out, first, pause);
}

inline void Shards::launch_ranks(const Group& group, int leave_out, int first, std::chrono::microseconds pause) {
  for (int i = 0; i < kv; ++i) {
    const int rank = (first + i) % kv;
    const gpu::PeerGroup seen = group.seen_by(rank);
    b.kernels->sharded_step.run(launch_args(seen, rank, leave_out), group.streams[static_cast<std::size_t>(rank)]);
    if (pause.count() > 0) std::this_thread::sleep_for(pause);
  }
  group.synchronize();
}

// 16-bit: partials are summed in another order, and o is rounded to storage on both sides.
inline double tolerance(DType type) { return type == DType::f32 ? 2e-5 : type == DType::bf16 ? 8e-3 : 1.2e-3; }

inline std::vector<float> values(const MirroredBuffer& o, DType type) {
  const auto bytes = o.from_gpu<unsigned char>();
  std::vector<float> out;
  for (std::size_t i = 0; i < bytes.size() / size_of(type); ++i)
    out.push_back(value_at(type, bytes.data(), static_cast<std::int64_t>(i)));
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

}  // namespace nsa::test
