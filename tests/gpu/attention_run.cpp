#include "gpu/attention_run.hpp"

#include <algorithm>
#include <limits>
#include <string>

namespace nsa::test::attention {

LayerShape shape_of(DType type, int groups, int h, int d_k, int d_v) {
  LayerShape s;
  s.groups = groups;
  s.heads_per_group = h;
  s.d_k = d_k;
  s.d_v = d_v;
  s.dtype = type;
  return s;
}

namespace {

RowMap chunked(const Case& c, std::int64_t chunk, std::int32_t halo, std::int32_t rank) {
  RowMap m;
  if (c.kv == 1) return m;
  m.chunk = chunk;
  m.stride = chunk + halo;
  m.halo = halo;
  m.kv = c.kv;
  m.rank = c.gathered ? all_ranks : rank;
  return m;
}

// fp32 and 16-bit inputs are multiplied and summed in fp32, in another order and with another exponential: a few times
// 2^-24 per step over at most a few thousand steps. Tensor cores also round the weights P to storage: 2^-9 (bf16) or
// 2^-12 (fp16) per element, random in sign.
double tolerance(DType type) { return type == DType::f32 ? 2e-5 : type == DType::bf16 ? 4e-3 : 6e-4; }

void attend_on(const Backend& b, Branch branch, const Case& c, const StageArgs& stage, const MirroredBuffer& q,
               const MirroredKv& k, const MirroredKv& v, const MirroredBuffer& partials, const MirroredBuffer& reads,
               const MirroredBuffer* selected, const MirroredBuffer* lse, const MirroredBuffer* scores,
               const MirroredBuffer& scratch, const AttendKernel& kernel) {
  AttendArgs a{stage};
  a.q = q.on<void>(b);
  a.k = k.on(b);
  a.v = v.on(b);
  a.out = partials_at(partials.on<float>(b), a.shape, a.tile.rows(), branch);
  a.reads = reads.on<std::int64_t>(b) + branch * c.batch * a.shape.groups;
  if (selected) a.selected = selected->on<std::int32_t>(b);
  if (lse) a.lse = lse->on<float>(b);
  if (scores) a.scores = scores->on<void>(b);
  a.scratch = scratch.on<void>(b);
  a.scratch_bytes = b.kind == BackendKind::host ? scratch.bytes() : std::min(scratch.bytes(), c.max_scratch);
  kernel.run(a, nullptr);
}

// The selection rule, applied to the scores of the GPU.
std::vector<std::int32_t> best_blocks(const BlockRules& r, std::int64_t t, const std::vector<float>& score) {
  std::vector<std::int32_t> order;
  for (std::int64_t j = 0; j < eligible_blocks(r, t); ++j) order.push_back(static_cast<std::int32_t>(j));
  const auto key = [&](std::int32_t j) {
    return is_forced(r, j, t) ? std::numeric_limits<float>::infinity() : score[j];
  };
  std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) { return key(a) > key(b); });
  if (static_cast<int>(order.size()) > r.n_sel) order.resize(r.n_sel);
  std::sort(order.begin(), order.end());
  order.resize(r.n_sel, -1);
  return order;
}

template <class T>
void check_same(const std::vector<T>& ours, const std::vector<T>& theirs) {
  std::size_t different = 0, first = 0;
  for (std::size_t i = ours.size(); i-- > 0;)
    if (!(ours[i] == theirs[i])) ++different, first = i;
  INFO(different << " of " << ours.size() << " differ, the first at " << first << ": " << ours[first] << " is to be "
                 << theirs[first]);
  CHECK(different == 0);
}

// The fused step must have the same blocks and scores as the stages, and outputs near the host's (o_branch: `host`).
void check_fused(const Run& run, const std::vector<float>& host) {
  const Case& c = run.c;
  const LayerShape& s = run.s;
  INFO("fused, left out: " << c.left_out);
  if (c.left_out != sel) {
    check_same(run.fused_selected->from_gpu<std::int32_t>(), run.gpu_selected);
    check_same(run.fused_p_slc->from_gpu<float>(), run.p_slc[0]->from_gpu<float>());
  }
  const std::int64_t planes = std::int64_t{c.batch} * s.groups, branch_floats = run.rows * s.heads() * s.d_v;
  const auto fused_o = run.fused_o_branch->from_gpu<float>();
  const auto gate = run.gate->from_gpu<float>();
  std::vector<float> sum(branch_floats, 0.0f);
  for (int b = 0; b < branches; ++b) {
    INFO("branch " << branch_names[b]);
    const auto reads = run.fused_reads->from_gpu<std::int64_t>(), expected = run.reads[0]->from_gpu<std::int64_t>();
    const bool is_read = b != c.left_out || b == cmp;  // cmp still computes its scores
    for (std::int64_t i = b * planes; i < (b + 1) * planes; ++i) CHECK(reads[i] == (is_read ? expected[i] : 0));
    if (b == c.left_out) continue;
    const std::vector<float> ours(fused_o.begin() + b * branch_floats, fused_o.begin() + (b + 1) * branch_floats);
    const std::vector<float> theirs(host.begin() + b * branch_floats, host.begin() + (b + 1) * branch_floats);
    if (c.tokens == 1)
      CHECK(relative_error(ours, theirs) < tolerance(s.dtype));  // a prefill tile does not write o_branch
    for (std::int64_t i = 0; i < branch_floats; ++i)
      sum[i] += gate[i / s.d_v / s.heads_per_group * branches + b] * theirs[i];
  }
  CHECK(relative_error(values_of(*run.fused_o, s.dtype, branch_floats).first, sum) < 2 * tolerance(s.dtype));
}

using Buffers = std::vector<std::unique_ptr<MirroredBuffer>>;

// Inputs and scratch of a case, and the passes that fill a Run with results.
struct Passes {
  Run& run;
  const Case& c;
  const LayerShape& s;
  std::size_t kernel;
  int ranks;
  std::int64_t planes;
  QueryTile tile;  // without first_position, which differs by backend
  MirroredBuffer position, lse_all, partials_all, candidates_all;
  MirroredKv q;
  Buffers scores, scratch;
  std::vector<std::unique_ptr<MirroredKv>> k[branches], v[branches];  // by rank

  Passes(Run& results, std::size_t kernel_index);
  const AttendKernel& route(const Backend& b, Branch branch) const;
  StageArgs stage(const Backend& b) const;
  std::int64_t scratch_bytes() const;
  std::unique_ptr<MirroredKv> cache(const RowMap& map, std::int64_t count, int width, const char* name) const;
  void add_caches(int rank);
  void add_rank(int rank);
  void gather(const Backend& b, const Buffers& from, const MirroredBuffer& to) const;
  void attend(const Backend& b, Branch branch, int rank) const;
  void rank_blocks(const Backend& b, int rank) const;
  void select(const Backend& b) const;
  void attend_selected(const Backend& b) const;
  AttentionArgs fused_args(const MirroredBuffer& partials, const MirroredBuffer& lse, const MirroredBuffer& raw) const;
  void run_fused() const;
};

std::int64_t lse_floats(const LayerShape& s, std::int64_t rows, int ranks) {
  return lse_slots(s, ranks) * rows * s.heads() * 2;
}

Passes::Passes(Run& results, std::size_t kernel_index)
    : run(results),
      c(run.c),
      s(run.s),
      kernel(kernel_index),
      ranks(c.gathered ? 1 : c.kv),
      planes(std::int64_t{c.batch} * s.groups),
      tile{0, c.batch, c.tokens, nullptr, c.positions()},
      position(8),
      lse_all(ranks * lse_floats(s, run.rows, ranks) * 4),
      partials_all(ranks * partial_floats(s, run.rows) * 4),
      candidates_all(ranks * run.lists * s.rules.n_sel * 8),
      q(s.dtype, RowMap{}, 1, run.rows, s.heads() * s.d_k) {
  *position.host<std::int64_t>() = c.first;
  position.to_gpu();
  q.fill(1, 1, run.rows, "q", c.q_scale);
  for (int rank = 0; rank < ranks; ++rank) {
    add_caches(rank);
    add_rank(rank);
  }
}

const AttendKernel& Passes::route(const Backend& b, Branch branch) const {
  const auto& list = b.kernels->attend[branch];
  const std::size_t i = b.kind == BackendKind::host ? 0 : kernel;
  return i < list.size() && list[i].accepts(s, tile) ? list[i] : list[0];
}

StageArgs Passes::stage(const Backend& b) const {
  const bool whole = c.kv == 1 || c.gathered;
  const auto recompute = route(b, cmp).recompute_scores;
  QueryTile here = tile;
  here.first_position = position.on<std::int64_t>(b);
  return {s, here, AttentionPolicy{c.tokens > 1 && whole && !c.scored && recompute && recompute(s)}};
}

// What the kernel that needs most needs, on either backend.
std::int64_t Passes::scratch_bytes() const {
  std::size_t largest = 0;
  for (const Backend* b : {&cpu(), &gpu()}) {
    const StageArgs args = stage(*b);
    largest = std::max(largest, b->kernels->scratch_bytes(s, args.tile, args.policy));
    for (const auto& list : b->kernels->attend)
      for (const AttendKernel& attend : list)
        if (attend.scratch) largest = std::max(largest, attend.scratch(s, args.tile, args.policy));
  }
  return static_cast<std::int64_t>(largest);
}

std::unique_ptr<MirroredKv> Passes::cache(const RowMap& map, std::int64_t count, int width, const char* name) const {
  auto kv = std::make_unique<MirroredKv>(s.dtype, map, planes, std::max<std::int64_t>(count, 1), width);
  if (name[0] == 'v') kv->memory.clear();
  if (count > 0) kv->fill(c.batch, s.groups, count, name);
  return kv;
}

void Passes::add_caches(int rank) {
  const BlockRules& r = s.rules;
  const std::int64_t n = compressed_tokens(r, c.positions() - 1);
  const RowMap cmp_map = chunked(c, s.lse.segment, r.l / r.d - 1, rank),
               token_map = chunked(c, c.chunk_blocks * r.l_sel, 0, rank);
  RowMap win_map = token_map;
  if (c.ring) {
    win_map = {};
    win_map.ring = r.w;
    win_map.slot_begin = std::int64_t{rank} * r.w / ranks;
    win_map.slot_end = std::int64_t{rank + 1} * r.w / ranks;
  }
  k[cmp].push_back(cache(cmp_map, n, s.d_k, "k_cmp"));
  v[cmp].push_back(cache(cmp_map, n, s.d_v, "v_cmp"));
  k[sel].push_back(cache(token_map, c.positions(), s.d_k, "k_sel"));
  v[sel].push_back(cache(token_map, c.positions(), s.d_v, "v_sel"));
  k[win].push_back(cache(win_map, c.positions(), s.d_k, "k_win"));
  v[win].push_back(cache(win_map, c.positions(), s.d_v, "v_win"));
}

// The rank's results and scratch; its caches are there.
void Passes::add_rank(int rank) {
  const std::int64_t n = compressed_tokens(s.rules, c.positions() - 1);
  const RowMap& cmp_map = k[cmp][rank]->view.map;
  const std::int64_t cmp_rows = ranks == 1 ? n : MirroredKv::capacity(cmp_map, std::max<std::int64_t>(n, 1));
  const auto score_bytes = [&](const Backend& b) { return b.kernels->score_bytes(s, stage(b).tile, cmp_rows); };
  const auto largest = static_cast<std::int64_t>(std::max(score_bytes(cpu()), score_bytes(gpu())));
  const auto add = [](Buffers& to, std::int64_t bytes) { to.push_back(std::make_unique<MirroredBuffer>(bytes)); };
  add(scores, std::max<std::int64_t>(largest, 16));
  add(scratch, scratch_bytes());
  add(run.partials, partial_floats(s, run.rows) * 4);
  add(run.lse, lse_floats(s, run.rows, ranks) * 4);
  add(run.p_slc, run.lists * run.blocks * 4);
  add(run.candidates, run.lists * s.rules.n_sel * 8);
  add(run.reads, branches * planes * 8);
  run.reads.back()->clear();
}

void Passes::gather(const Backend& b, const Buffers& from, const MirroredBuffer& to) const {
  for (int rank = 0; rank < ranks; ++rank)
    b.device->copy(to.on<char>(b) + rank * from[rank]->bytes(), from[rank]->on<void>(b), from[rank]->bytes(), nullptr);
}

void Passes::attend(const Backend& b, Branch branch, int rank) const {
  attend_on(b, branch, c, stage(b), q.memory, *k[branch][rank], *v[branch][rank], *run.partials[rank], *run.reads[rank],
            branch == sel ? run.selected.get() : nullptr, branch == cmp ? run.lse[rank].get() : nullptr,
            branch == cmp ? scores[rank].get() : nullptr, *scratch[rank], route(b, branch));
}

void Passes::rank_blocks(const Backend& b, int rank) const {
  RankArgs a{stage(b)};
  a.scores = scores[rank]->on<void>(b);
  a.lse = lse_all.on<float>(b);
  a.lse_ranks = ranks;
  a.cmp_map = k[cmp][rank]->view.map;
  a.token_map = k[sel][rank]->view.map;
  a.candidates = run.candidates[rank]->on<Candidate>(b);
  a.q = q.memory.on<void>(b);
  a.k_cmp = k[cmp][rank]->on(b);
  a.cmp_ms = partials_at(run.partials[rank]->on<float>(b), s, run.rows, cmp).ms;
  if (ranks == 1) a.selected = run.selected->on<std::int32_t>(b);
  a.p_slc = run.p_slc[rank]->on<float>(b);
  a.p_slc_blocks = run.blocks;
  a.scratch = scratch[rank]->on<void>(b);
  a.scratch_bytes = scratch[rank]->bytes();
  b.kernels->rank(a, nullptr);
}

// cmp and win, the scores of the blocks, and the choice.
void Passes::select(const Backend& b) const {
  for (int rank = 0; rank < ranks; ++rank) {
    attend(b, cmp, rank);
    attend(b, win, rank);
  }
  gather(b, run.lse, lse_all);
  for (int rank = 0; rank < ranks; ++rank) rank_blocks(b, rank);
  gather(b, run.candidates, candidates_all);
  if (ranks > 1)
    b.kernels->select({stage(b), candidates_all.on<Candidate>(b), ranks, run.selected->on<std::int32_t>(b)}, nullptr);
}

// sel, and the outputs.
void Passes::attend_selected(const Backend& b) const {
  for (int rank = 0; rank < ranks; ++rank) attend(b, sel, rank);
  gather(b, run.partials, partials_all);
  CombineArgs a{stage(b)};
  a.partials = partials_all.on<float>(b);
  a.ranks = ranks;
  a.gate = run.gate->on<float>(b);
  a.o = run.o->on<void>(b);
  for (int branch = 0; branch < branches; ++branch)
    a.o_branch[branch] = run.o_branch->on<float>(b) + branch * run.rows * s.heads() * s.d_v;
  b.kernels->combine(a, nullptr);
}

AttentionArgs Passes::fused_args(const MirroredBuffer& partials, const MirroredBuffer& lse,
                                 const MirroredBuffer& raw) const {
  const Backend& b = gpu();
  StageArgs common = stage(b);
  common.scratch = scratch[0]->on<void>(b);
  common.scratch_bytes = scratch[0]->bytes();
  AttentionArgs a;
  for (int branch = 0; branch < branches; ++branch) {
    AttendArgs& of = a.attend[branch];
    static_cast<StageArgs&>(of) = common;
    of.q = q.memory.on<void>(b);
    of.k = k[branch][0]->on(b);
    of.v = v[branch][0]->on(b);
    of.out = partials_at(partials.on<float>(b), s, run.rows, static_cast<Branch>(branch));
    of.reads = run.fused_reads->on<std::int64_t>(b) + branch * planes;
    if (c.tokens == 1)
      a.combine.o_branch[branch] = run.fused_o_branch->on<float>(b) + branch * run.rows * s.heads() * s.d_v;
  }
  a.rank.lse = a.attend[cmp].lse = lse.on<float>(b);
  a.rank.scores = a.attend[cmp].scores = raw.on<void>(b);
  static_cast<StageArgs&>(a.rank) = common;
  a.rank.cmp_map = k[cmp][0]->view.map;
  a.rank.token_map = k[sel][0]->view.map;
  a.rank.q = q.memory.on<void>(b);
  a.rank.k_cmp = k[cmp][0]->on(b);
  a.rank.cmp_ms = a.attend[cmp].out.ms;
  a.attend[sel].selected = a.rank.selected = run.fused_selected->on<std::int32_t>(b);
  a.rank.p_slc = run.fused_p_slc->on<float>(b);
  a.rank.p_slc_blocks = run.blocks;
  static_cast<StageArgs&>(a.combine) = common;
  a.combine.partials = partials.on<float>(b);
  a.combine.gate = run.gate->on<float>(b);
  a.combine.o = run.fused_o->on<void>(b);
  if (c.left_out >= 0) {
    a.combine.leave_out[c.left_out] = true;
    a.attend[cmp].scores_only = c.left_out == cmp;
  }
  return a;
}

void Passes::run_fused() const {
  run.fused_selected = std::make_unique<MirroredBuffer>(run.selected->bytes());
  run.fused_o = std::make_unique<MirroredBuffer>(run.o->bytes());
  run.fused_o_branch = std::make_unique<MirroredBuffer>(run.o_branch->bytes());
  run.fused_p_slc = std::make_unique<MirroredBuffer>(run.p_slc[0]->bytes());
  run.fused_reads = std::make_unique<MirroredBuffer>(run.reads[0]->bytes());
  run.fused_reads->clear();
  const MirroredBuffer partials(run.partials[0]->bytes()), lse(run.lse[0]->bytes()), raw(scores[0]->bytes());
  const AttentionArgs a = fused_args(partials, lse, raw);
  const KernelTable& kernels = *gpu().kernels;
  const FusedOp<AttentionArgs>& op = c.tokens > 1 ? kernels.prefill_attention : kernels.decode_attention;
  run.fused = op.accepts(a);
  if (run.fused) op.run(a, nullptr);
  gpu().device->synchronize(nullptr);
}

}  // namespace

Run::Run(const Case& given, std::size_t kernel) : c(given), s(given.shape) {
  s.lse.segment = c.chunk_blocks * s.rules.l_sel / s.rules.d;
  s.lse.buckets = 24;
  rows = std::int64_t{c.batch} * c.tokens;
  lists = rows * s.groups;
  blocks = eligible_blocks(s.rules, c.positions() - 1);
  gate = std::make_unique<MirroredBuffer>(lists * 3 * 4);
  for (std::int64_t i = 0; i < lists * 3; ++i) gate->host<float>()[i] = 0.1f + 0.2f * static_cast<float>(i % 4);
  gate->to_gpu();
  selected = std::make_unique<MirroredBuffer>(lists * s.rules.n_sel * 4);
  const Passes passes(*this, kernel);
  for (const Backend* b : {&cpu(), &gpu()}) passes.select(*b);
  gpu_selected = selected->from_gpu<std::int32_t>();
  selected->to_gpu();  // both attend the same blocks, so that near ties do not become differences
  const std::int64_t elements = rows * s.heads() * s.d_v;
  o = std::make_unique<MirroredBuffer>(elements * static_cast<std::int64_t>(size_of(s.dtype)));
  o_branch = std::make_unique<MirroredBuffer>(branches * elements * 4);
  for (const Backend* b : {&cpu(), &gpu()}) passes.attend_selected(*b);
  gpu().device->synchronize(nullptr);
  if (kernel == 0 && passes.ranks == 1 && (!c.gathered || c.tokens > 1)) passes.run_fused();
}

void check(const Run& run) {
  const Case& c = run.c;
  const LayerShape& s = run.s;
  INFO("h=" << s.heads_per_group << " groups=" << s.groups << " Dk=" << s.d_k << " Dv=" << s.d_v << " "
            << name_of(s.dtype) << " batch=" << c.batch << " first=" << c.first << " tokens=" << c.tokens
            << " kv=" << c.kv << (c.gathered ? " gathered" : "") << (c.ring ? " ring" : "") << " l=" << s.rules.l
            << " d=" << s.rules.d << " l'=" << s.rules.l_sel << " n=" << s.rules.n_sel << " w=" << s.rules.w);
  const std::int64_t branch_floats = run.rows * s.heads() * s.d_v;
  const auto [device, host] = values_of(*run.o_branch, DType::f32, branches * branch_floats);
  for (int b = 0; b < branches; ++b) {
    INFO("branch " << branch_names[b]);
    const std::vector<float> ours(device.begin() + b * branch_floats, device.begin() + (b + 1) * branch_floats);
    const std::vector<float> theirs(host.begin() + b * branch_floats, host.begin() + (b + 1) * branch_floats);
    CHECK(relative_error(ours, theirs) < tolerance(s.dtype));
  }
  // o is rounded to storage on both sides, which adds one ulp.
  CHECK(relative_error(*run.o, s.dtype) < 2 * tolerance(s.dtype));
  std::vector<float> gpu_scores(run.lists * run.blocks, 0.0f), host_scores = gpu_scores;
  for (std::size_t rank = 0; rank < run.p_slc.size(); ++rank) {
    INFO("rank " << rank);
    CHECK(same_bits(*run.reads[rank]));
    const auto [ours, theirs] = values_of(*run.p_slc[rank], DType::f32, run.lists * run.blocks);
    for (std::size_t i = 0; i < ours.size(); ++i) gpu_scores[i] += ours[i], host_scores[i] += theirs[i];
  }
  CHECK(relative_error(gpu_scores, host_scores) < 2e-5);  // fp32 throughout, in every kernel
  bool chosen_by_rule = true;
  for (std::int64_t list = 0; list < run.lists; ++list) {
    const std::int64_t t = c.first + list / s.groups % c.tokens;
    const std::vector<float> score(gpu_scores.begin() + list * run.blocks,
                                   gpu_scores.begin() + (list + 1) * run.blocks);
    const auto expected = best_blocks(s.rules, t, score);
    chosen_by_rule &= std::equal(expected.begin(), expected.end(), run.gpu_selected.begin() + list * s.rules.n_sel);
  }
  CHECK(chosen_by_rule);
  if (run.fused) check_fused(run, host);
}

void run_and_check(const Case& c) {
  std::size_t kernels = 0;
  for (const auto& list : gpu().kernels->attend) kernels = std::max(kernels, list.size());
  for (std::size_t kernel = 0; kernel < kernels; ++kernel) {
    INFO("kernel " << kernel << " of the lists");
    check(Run(c, kernel));
  }
}

void check_on_every_layout(Case c) {
  const Run one(c);
  check(one);
  CHECK(one.fused);
  const auto scores = one.p_slc[0]->from_gpu<float>();
  c.ring = true;
  for (const int kv : {2, 3}) {
    c.kv = kv;
    const Run sharded(c);
    check(sharded);
    CHECK(sharded.gpu_selected == one.gpu_selected);
    std::vector<float> sum(scores.size(), 0.0f);
    for (const auto& p_slc : sharded.p_slc) {
      const auto values = p_slc->from_gpu<float>();
      for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += values[i];  // each block belongs to one rank
    }
    CHECK(sum == scores);
  }
}

}  // namespace nsa::test::attention
