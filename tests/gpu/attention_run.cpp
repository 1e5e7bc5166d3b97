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

}  // namespace

Run::Run(const Case& given, std::size_t kernel) : c(given), s(given.shape) {
  s.lse.segment = c.chunk_blocks * s.rules.l_sel / s.rules.d;
  s.lse.buckets = 24;
  const BlockRules& r = s.rules;
  const std::int64_t planes = std::int64_t{c.batch} * s.groups, T = c.positions(), n = compressed_tokens(r, T - 1);
  const std::int64_t chunk_tokens = c.chunk_blocks * r.l_sel;
  QueryTile tile{0, c.batch, c.tokens, nullptr, T};
  const bool whole = c.kv == 1 || c.gathered;
  const auto route = [&](const Backend& b, Branch branch) -> const AttendKernel& {
    const auto& list = b.kernels->attend[branch];
    const std::size_t i = b.kind == BackendKind::host ? 0 : kernel;
    return i < list.size() && list[i].accepts(s, tile) ? list[i] : list[0];
  };
  const auto policy = [&](const Backend& b) {
    const AttendKernel& first = route(b, cmp);
    const auto recompute = first.recompute_scores;
    return AttentionPolicy{c.tokens > 1 && whole && !c.scored && recompute && recompute(s)};
  };
  rows = tile.rows();
  lists = rows * s.groups;
  blocks = eligible_blocks(r, T - 1);
  const int ranks = c.gathered ? 1 : c.kv;
  MirroredBuffer position(8);
  *position.host<std::int64_t>() = c.first;
  position.to_gpu();
  const std::int64_t size = static_cast<std::int64_t>(size_of(s.dtype));
  MirroredKv q(s.dtype, RowMap{}, 1, rows, s.heads() * s.d_k);
  q.fill(1, 1, rows, "q", c.q_scale);
  gate = std::make_unique<MirroredBuffer>(lists * 3 * 4);
  for (std::int64_t i = 0; i < lists * 3; ++i) gate->host<float>()[i] = 0.1f + 0.2f * static_cast<float>(i % 4);
  gate->to_gpu();
  selected = std::make_unique<MirroredBuffer>(lists * r.n_sel * 4);
  const std::int64_t lse_floats = lse_slots(s, ranks) * rows * s.heads() * 2;
  MirroredBuffer lse_all(ranks * lse_floats * 4), partials_all(ranks * partial_floats(s, rows) * 4),
      candidates_all(ranks * lists * r.n_sel * 8);
  std::vector<std::unique_ptr<MirroredBuffer>> scores, scratch;
  std::vector<std::unique_ptr<MirroredKv>> k_cmp, v_cmp, k_sel, v_sel, k_win, v_win;
  const auto tile_on = [&](const Backend& b) {
    QueryTile t = tile;
    t.first_position = position.on<std::int64_t>(b);
    return t;
  };
  std::size_t largest = 0;
  for (const Backend* b : {&cpu(), &gpu()}) {
    largest = std::max(largest, b->kernels->scratch_bytes(s, tile_on(*b), policy(*b)));
    for (const auto& list : b->kernels->attend)
      for (const AttendKernel& kernel : list)
        if (kernel.scratch) largest = std::max(largest, kernel.scratch(s, tile_on(*b), policy(*b)));
  }
  const auto scratch_bytes = static_cast<std::int64_t>(largest);
  for (int rank = 0; rank < ranks; ++rank) {
    const RowMap cmp_map = chunked(c, s.lse.segment, r.l / r.d - 1, rank),
                 token_map = chunked(c, chunk_tokens, 0, rank);
    RowMap win_map = token_map;
    if (c.ring) {
      win_map = {};
      win_map.ring = r.w;
      win_map.slot_begin = std::int64_t{rank} * r.w / ranks;
      win_map.slot_end = std::int64_t{rank + 1} * r.w / ranks;
    }
    const auto cache = [&](const RowMap& map, std::int64_t count, int width, const char* name) {
      auto kv = std::make_unique<MirroredKv>(s.dtype, map, planes, std::max<std::int64_t>(count, 1), width);
      if (name[0] == 'v') kv->memory.clear();
      if (count > 0) kv->fill(c.batch, s.groups, count, name);
      return kv;
    };
    k_cmp.push_back(cache(cmp_map, n, s.d_k, "k_cmp"));
    v_cmp.push_back(cache(cmp_map, n, s.d_v, "v_cmp"));
    k_sel.push_back(cache(token_map, T, s.d_k, "k_sel"));
    v_sel.push_back(cache(token_map, T, s.d_v, "v_sel"));
    k_win.push_back(cache(win_map, T, s.d_k, "k_win"));
    v_win.push_back(cache(win_map, T, s.d_v, "v_win"));
    const std::int64_t cmp_rows = ranks == 1 ? n : MirroredKv::capacity(cmp_map, std::max<std::int64_t>(n, 1));
    const std::int64_t score_bytes =
        static_cast<std::int64_t>(std::max(cpu().kernels->score_bytes(s, tile_on(cpu()), cmp_rows),
                                           gpu().kernels->score_bytes(s, tile_on(gpu()), cmp_rows)));
    scores.push_back(std::make_unique<MirroredBuffer>(std::max<std::int64_t>(score_bytes, 16)));
    scratch.push_back(std::make_unique<MirroredBuffer>(scratch_bytes));
    partials.push_back(std::make_unique<MirroredBuffer>(partial_floats(s, rows) * 4));
    lse.push_back(std::make_unique<MirroredBuffer>(lse_floats * 4));
    p_slc.push_back(std::make_unique<MirroredBuffer>(lists * blocks * 4));
    candidates.push_back(std::make_unique<MirroredBuffer>(lists * r.n_sel * 8));
    reads.push_back(std::make_unique<MirroredBuffer>(branches * planes * 8));
    std::memset(reads.back()->host<void>(), 0, reads.back()->bytes());
    reads.back()->to_gpu();
  }
  const auto gather = [&](const Backend& b, const std::vector<std::unique_ptr<MirroredBuffer>>& from,
                          const MirroredBuffer& to) {
    for (int rank = 0; rank < ranks; ++rank)
      b.device->copy(to.on<char>(b) + rank * from[rank]->bytes(), from[rank]->on<void>(b), from[rank]->bytes(),
                     nullptr);
  };
  for (const Backend* b : {&cpu(), &gpu()}) {
    const StageArgs stage{s, tile_on(*b), policy(*b)};
    for (int rank = 0; rank < ranks; ++rank) {
      attend_on(*b, cmp, c, stage, q.memory, *k_cmp[rank], *v_cmp[rank], *partials[rank], *reads[rank], nullptr,
                lse[rank].get(), scores[rank].get(), *scratch[rank], route(*b, cmp));
      attend_on(*b, win, c, stage, q.memory, *k_win[rank], *v_win[rank], *partials[rank], *reads[rank], nullptr,
                nullptr, nullptr, *scratch[rank], route(*b, win));
    }
    gather(*b, lse, lse_all);
    for (int rank = 0; rank < ranks; ++rank) {
      RankArgs a{stage};
      a.scores = scores[rank]->on<void>(*b);
      a.lse = lse_all.on<float>(*b);
      a.lse_ranks = ranks;
      a.cmp_map = k_cmp[rank]->view.map;
      a.token_map = k_sel[rank]->view.map;
      a.candidates = candidates[rank]->on<Candidate>(*b);
      a.q = q.memory.on<void>(*b);
      a.k_cmp = k_cmp[rank]->on(*b);
      a.cmp_ms = partials_at(partials[rank]->on<float>(*b), s, rows, cmp).ms;
      if (ranks == 1) a.selected = selected->on<std::int32_t>(*b);
      a.p_slc = p_slc[rank]->on<float>(*b);
      a.p_slc_blocks = blocks;
      a.scratch = scratch[rank]->on<void>(*b);
      a.scratch_bytes = scratch[rank]->bytes();
      b->kernels->rank(a, nullptr);
    }
    gather(*b, candidates, candidates_all);
    if (ranks > 1)
      b->kernels->select({stage, candidates_all.on<Candidate>(*b), ranks, selected->on<std::int32_t>(*b)}, nullptr);
  }
  gpu_selected = selected->from_gpu<std::int32_t>();
  selected->to_gpu();  // both attend the same blocks, so that near ties do not become differences
  o = std::make_unique<MirroredBuffer>(rows * s.heads() * s.d_v * size);
  o_branch = std::make_unique<MirroredBuffer>(branches * rows * s.heads() * s.d_v * 4);
  for (const Backend* b : {&cpu(), &gpu()}) {
    const StageArgs stage{s, tile_on(*b), policy(*b)};
    for (int rank = 0; rank < ranks; ++rank)
      attend_on(*b, sel, c, stage, q.memory, *k_sel[rank], *v_sel[rank], *partials[rank], *reads[rank], selected.get(),
                nullptr, nullptr, *scratch[rank], route(*b, sel));
    gather(*b, partials, partials_all);
    CombineArgs a{stage};
    a.partials = partials_all.on<float>(*b);
    a.ranks = ranks;
    a.gate = gate->on<float>(*b);
    a.o = o->on<void>(*b);
    for (int branch = 0; branch < branches; ++branch)
      a.o_branch[branch] = o_branch->on<float>(*b) + branch * rows * s.heads() * s.d_v;
    b->kernels->combine(a, nullptr);
  }
  gpu().device->synchronize(nullptr);
  const bool prefill = c.tokens > 1;
  if (kernel > 0 || ranks > 1 || (c.gathered && !prefill)) return;

  fused_selected = std::make_unique<MirroredBuffer>(selected->bytes());
  fused_o = std::make_unique<MirroredBuffer>(o->bytes());
  fused_o_branch = std::make_unique<MirroredBuffer>(o_branch->bytes());
  fused_p_slc = std::make_unique<MirroredBuffer>(p_slc[0]->bytes());
  fused_reads = std::make_unique<MirroredBuffer>(reads[0]->bytes());
  std::memset(fused_reads->host<void>(), 0, fused_reads->bytes());
  fused_reads->to_gpu();
  const Backend& b = gpu();
  const StageArgs stage{s, tile_on(b), policy(b), scratch[0]->on<void>(b), scratch[0]->bytes()};
  MirroredBuffer fused_partials(partials[0]->bytes()), fused_lse(lse[0]->bytes()), fused_scores(scores[0]->bytes());
  AttentionArgs a;
  const MirroredKv* k[branches] = {k_cmp[0].get(), k_sel[0].get(), k_win[0].get()};
  const MirroredKv* v[branches] = {v_cmp[0].get(), v_sel[0].get(), v_win[0].get()};
  for (int branch = 0; branch < branches; ++branch) {
    AttendArgs& of = a.attend[branch];
    static_cast<StageArgs&>(of) = stage;
    of.q = q.memory.on<void>(b);
    of.k = k[branch]->on(b);
    of.v = v[branch]->on(b);
    of.out = partials_at(fused_partials.on<float>(b), s, rows, static_cast<Branch>(branch));
    of.reads = fused_reads->on<std::int64_t>(b) + branch * planes;
    if (!prefill) a.combine.o_branch[branch] = fused_o_branch->on<float>(b) + branch * rows * s.heads() * s.d_v;
  }
  a.attend[cmp].lse = fused_lse.on<float>(b);
  a.attend[cmp].scores = fused_scores.on<void>(b);
  static_cast<StageArgs&>(a.rank) = stage;
  a.rank.scores = fused_scores.on<void>(b);
  a.rank.lse = fused_lse.on<float>(b);
  a.rank.cmp_map = k_cmp[0]->view.map;
  a.rank.token_map = k_sel[0]->view.map;
  a.rank.q = q.memory.on<void>(b);
  a.rank.k_cmp = k_cmp[0]->on(b);
  a.rank.cmp_ms = a.attend[cmp].out.ms;
  a.attend[sel].selected = a.rank.selected = fused_selected->on<std::int32_t>(b);
  a.rank.p_slc = fused_p_slc->on<float>(b);
  a.rank.p_slc_blocks = blocks;
  static_cast<StageArgs&>(a.combine) = stage;
  a.combine.partials = fused_partials.on<float>(b);
  a.combine.gate = gate->on<float>(b);
  a.combine.o = fused_o->on<void>(b);
  if (c.left_out >= 0) {
    a.combine.leave_out[c.left_out] = true;
    a.attend[cmp].scores_only = c.left_out == cmp;
  }
  const FusedOp<AttentionArgs>& op = prefill ? b.kernels->prefill_attention : b.kernels->decode_attention;
  fused = op.accepts(a);
  if (fused) op.run(a, nullptr);
  b.device->synchronize(nullptr);
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
