// Compares every attention stage of the CUDA backend with that of the host, on random inputs and NaN-filled buffers,
// over head counts, head sizes, lengths, layouts of the KV shards and types.

#include <algorithm>
#include <limits>
#include <memory>
#include <string>

#include "catch.hpp"
#include "gpu/mirrored.hpp"

using namespace nsa;
using namespace nsa::test;

namespace {

struct Case {
  LayerShape shape;
  std::int32_t batch = 1, tokens = 1;  // rows of the tile: tokens consecutive positions of every sequence
  std::int64_t first = 0;
  std::int32_t kv = 1;
  std::int32_t chunk_blocks = 2;
  bool gathered = false;  // prefill: K/V of all ranks in one buffer
  bool ring = false;      // decode: the window in a ring
  bool scored = false;    // prefill: cmp stores raw scores, even where rank could recompute them
  float q_scale = 2.0f;   // of q's elements: sets the spread of the scores
  int left_out = -1;      // the branch that the fused step leaves out; the stages compute all three
  // Bytes of scratch that attend gets on the GPU.
  std::size_t max_scratch = SIZE_MAX;
  std::int64_t positions() const { return first + tokens; }
};

LayerShape shape_of(DType type, int groups, int h, int d_k, int d_v) {
  LayerShape s;
  s.groups = groups;
  s.heads_per_group = h;
  s.d_k = d_k;
  s.d_v = d_v;
  s.dtype = type;
  return s;
}

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

// The results of all ranks of a layout, on the GPU and on the host.
struct Run {
  /// `kernel`: index of the GPU's implementation, where that accepts the shape; else the first one runs.
  explicit Run(const Case& c, std::size_t kernel = 0);
  Case c;
  LayerShape s;
  std::int64_t rows, lists, blocks;
  std::vector<std::unique_ptr<MirroredBuffer>> partials, lse, p_slc, candidates, reads;
  std::unique_ptr<MirroredBuffer> selected, gate, o, o_branch;
  std::vector<std::int32_t> gpu_selected;
  // The results of the fused operation where it accepts the case, on the GPU only.
  bool fused = false;
  std::unique_ptr<MirroredBuffer> fused_selected, fused_o, fused_o_branch, fused_p_slc, fused_reads;
};

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

// What padded instances of the decode kernels serve: head sizes that are multiples of 16, several head tiles of a
// group, more than 16 selected blocks. Each case is compared with the host, fused with its stages, and sharded with
// whole sequences, whose blocks must be the same bit for bit.
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

}  // namespace

TEST_CASE("cuda attention equals the host's over head counts, head sizes and types") {
  for (const DType type : {DType::f32, DType::bf16, DType::f16})
    for (const auto& [h, d_k, d_v] : {std::tuple{1, 32, 32},
                                      {2, 64, 64},
                                      {4, 64, 64},
                                      {16, 128, 128},
                                      {16, 64, 64},
                                      {8, 96, 128},
                                      {16, 192, 128},
                                      {4, 256, 256},
                                      {5, 24, 8},
                                      {3, 10, 6},
                                      {20, 64, 32},
                                      {16, 128, 64}}) {
      Case decode{shape_of(type, 2, h, d_k, d_v), 2, 1, 2333};
      run_and_check(decode);
      Case prefill{shape_of(type, 1, h, d_k, d_v), 1, 37, 1200};
      run_and_check(prefill);
    }
}

TEST_CASE("cuda attention equals the host's at every length") {
  for (const DType type : {DType::f32, DType::bf16})
    for (const std::int64_t first : {0, 1, 30, 31, 32, 47, 63, 64, 127, 511, 512, 1023, 1024, 1040, 4095, 9000}) {
      Case c{shape_of(type, 2, 4, 64, 64), 1, 1, first};
      run_and_check(c);
      CHECK(Run(c).fused);
      c.shape.heads_per_group = 16;
      c.batch = 3;
      c.ring = true;
      run_and_check(c);
      c.batch = 1;
      c.ring = false;
      c.tokens = 70;
      run_and_check(c);
    }
}

TEST_CASE("cuda attention equals the host's for other block geometries") {
  for (const DType type : {DType::f32, DType::bf16})
    for (const BlockRules& r : {BlockRules{16, 16, 16, 4, 0, 1, 1},
                                {32, 32, 64, 8, 1, 1, 100},
                                {8, 4, 32, 6, 2, 2, 4096},
                                {64, 16, 64, 16, 1, 2, 77},
                                {32, 16, 48, 5, 1, 2, 512},
                                {4, 1, 8, 40, 1, 2, 64}})
      for (const std::int64_t first : {0, 100, 1500}) {
        Case c{shape_of(type, 1, 16, 128, 128), 2, 1, first};
        c.shape.rules = r;
        run_and_check(c);
        c.batch = 1;
        c.tokens = 33;
        run_and_check(c);
      }
}

TEST_CASE("every kv layout selects the same blocks bit for bit and has the same outputs") {
  const int chunk_blocks = GENERATE(2, 8);  // without and with whole tiles
  for (const DType type : {DType::f32, DType::bf16})
    for (const std::int64_t first : {20, 130, 257, 1023, 1038, 1040, 5000, 33008}) {
      Case c{shape_of(type, 1, 16, 128, 128), 2, 1, first};
      c.chunk_blocks = chunk_blocks;
      for (std::size_t kernel = 0; kernel < gpu().kernels->attend[cmp].size(); ++kernel) {
        c.kv = 1;
        c.ring = false;
        const Run one(c, kernel);
        check(one);
        const auto one_scores = one.p_slc[0]->from_gpu<float>();
        for (const int kv : {2, 3, 4, 8}) {
          c.kv = kv;
          c.ring = true;
          const Run tiled(c, kernel);
          check(tiled);
          INFO("first=" << first << " kv=" << kv << " " << name_of(type) << " "
                        << gpu().kernels->attend[cmp][kernel].name);
          CHECK(tiled.gpu_selected == one.gpu_selected);
          std::vector<float> sum(one_scores.size(), 0.0f);
          for (const auto& p_slc : tiled.p_slc) {
            const auto values = p_slc->from_gpu<float>();
            for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += values[i];  // each block belongs to one rank
          }
          CHECK(sum == one_scores);
        }
      }
      c.ring = false;
      c.gathered = true;
      c.tokens = 17;
      for (const int kv : {1, 2, 4}) {
        c.kv = kv;
        run_and_check(c);
      }
    }
}

// Prefill tiles of the head sizes of the tuned kernels: starts, ends and lengths that are no multiple of a tile; few
// heads; chunks of one block to many; more than one tile of 128 tokens in every branch.
TEST_CASE("cuda prefill tiles equal the host's", "[prefill]") {
  for (const DType type : {DType::bf16, DType::f16})
    for (const int d : {64, 128})
      for (const int h : {16, 5, 1})
        for (const auto& [first, tokens] :
             {std::pair{0, 1}, {0, 70}, {15, 33}, {500, 19}, {1023, 66}, {2040, 129}, {5003, 40}}) {
          Case c{shape_of(type, 2, h, d, d), 1, tokens, first};
          c.chunk_blocks = 4;
          run_and_check(c);
          if (h == 5) c.batch = 2, run_and_check(c), c.batch = 1;
          c.scored = true;
          if (h == 16) run_and_check(c);
        }
}

// Head sizes that the tiled kernels pad, of K and V each, and blocks of 128 tokens.
TEST_CASE("cuda prefill takes every head size up to 192 and 128, and blocks of 128", "[prefill][padded_prefill]") {
  int index = 0;
  for (const auto& [d_k, d_v] : {std::pair{16, 16},
                                 {48, 48},
                                 {80, 80},
                                 {96, 96},
                                 {112, 112},
                                 {64, 128},
                                 {128, 16},
                                 {32, 96},
                                 {192, 128},
                                 {144, 48},
                                 {176, 112}})
    for (const int h : {16, 3})
      for (const auto& [first, tokens] : {std::pair{0, 70}, {500, 19}, {2040, 129}}) {
        ++index;
        Case c{shape_of(index % 2 ? DType::bf16 : DType::f16, 2, h, d_k, d_v), 1, tokens, first};
        c.chunk_blocks = 4;
        run_and_check(c);
      }
  for (const int d_k : {96, 128, 192})
    for (const auto& [n, first, tokens] : {std::tuple{16, 0, 203}, {5, 5003, 150}, {8, 2050, 300}}) {
      Case c{shape_of(DType::bf16, 4, 16, d_k, std::min(d_k, 128)), 1, tokens, first};
      c.shape.rules.l_sel = 128, c.shape.rules.n_sel = n;
      const Run run(c);
      CHECK(run.fused);
      check(run);
      c.scored = true;
      check(Run(c));
    }
}

// More chosen blocks than the single-pass kernel holds, and enough rows for tiles.
TEST_CASE("cuda prefill of many chosen blocks equals the host's", "[prefill]") {
  for (const int d : {64, 128})
    for (const int n : {17, 32}) {
      Case c{shape_of(DType::bf16, 2, 3, d, d), 1, 300, 2500};
      c.shape.rules.n_sel = n;
      run_and_check(c);
    }
}

// Scores whose spread is tens of powers of two: rows whose running maximum rises after the first tile, by much and by
// little, next to rows where it stays.
TEST_CASE("cuda prefill equals the host's where scores rise", "[prefill]") {
  for (const DType type : {DType::bf16, DType::f16})
    for (const int d : {64, 128})
      for (const float scale : {20.0f, 80.0f})
        for (const auto& [first, tokens] : {std::pair{300, 70}, {4090, 40}}) {
          Case c{shape_of(type, 4, 16, d, d), 1, tokens, first};
          c.q_scale = scale;
          run_and_check(c);
        }
  // The fused operation attends the selection of the GPU: with 80, most block scores are 0 on one side and 1e-40 on the
  // other.
  Case c{shape_of(DType::bf16, 4, 16, 128, 128), 1, 203, 2000};
  c.q_scale = 20.0f;
  const Run run(c);
  check(run);
  CHECK(run.fused);
}

TEST_CASE("cuda prefill selects the same blocks on every layout and tile", "[prefill]") {
  for (const int chunk_blocks : {2, 4, 16})
    for (const auto& [first, tokens] : {std::pair{0, 100}, {1020, 77}, {6007, 50}}) {
      Case c{shape_of(DType::bf16, 1, 16, 128, 128), 1, tokens, first};
      c.chunk_blocks = chunk_blocks;
      c.gathered = true;
      const Run one(c);
      check(one);
      const auto scores = one.p_slc[0]->from_gpu<float>();
      for (const int kv : {2, 3, 8}) {
        c.kv = kv;
        const Run tiled(c);
        check(tiled);
        INFO("first=" << first << " kv=" << kv << " chunk_blocks=" << chunk_blocks);
        CHECK(tiled.gpu_selected == one.gpu_selected);
        CHECK(tiled.p_slc[0]->from_gpu<float>() == scores);
      }
    }
}

// The fused prefill tile, which accepts tiles with enough rows to fill the GPU: starts before the first compressed
// token, ends that are no multiple of a tile, few heads, chunks gathered from several ranks.
TEST_CASE("fused cuda prefill equals the host's and selects what the stages select", "[prefill][once]") {
  const auto run_fused = [](const Case& c) {
    const Run run(c);
    check(run);
    CHECK(run.fused);
  };
  Case early{shape_of(DType::bf16, 12, 1, 64, 64), 2, 30, 0};
  run_fused(early);
  for (const DType type : {DType::bf16, DType::f16})
    for (const auto& [d, h, first, tokens] : {std::tuple{128, 16, 0, 203},
                                              {128, 5, 1020, 199},
                                              {128, 1, 4990, 194},
                                              {64, 16, 2045, 200},
                                              {64, 7, 0, 1000}}) {
      Case c{shape_of(type, 4, h, d, d), 1, tokens, first};
      run_fused(c);
    }
  Case c{shape_of(DType::bf16, 2, 16, 128, 128), 2, 205, 1500};
  run_fused(c);
  c.chunk_blocks = 4;
  c.gathered = true;
  for (const int kv : {2, 3}) {
    c.kv = kv;
    run_fused(c);
  }
  c = {shape_of(DType::bf16, 2, 16, 128, 128), 1, 20, 1500};
  CHECK_FALSE(Run(c).fused);
}

// The fused step on clusters of every size: enough work items for each, and enough tiles that warps have several of
// them; every count of blocks around those that a warp scores together; a branch left out. Chunks of 16 blocks have
// whole tiles, by which their blocks are scored; chunks of 2 blocks have none.
TEST_CASE("a fused decode step equals its stages", "[step]") {
  const int chunk_blocks = GENERATE(2, 16);
  for (const DType type : {DType::bf16, DType::f16, DType::f32})
    for (const auto& [batch, first] : {std::pair{1, 33},
                                       {1, 2333},
                                       {1, 40000},
                                       {2, 9000},
                                       {5, 6000},
                                       {9, 5000},
                                       {13, 5000},
                                       {20, 4000},
                                       {40, 3000},
                                       {90, 1999},
                                       {150, 1111}}) {
      if (type != DType::bf16 && batch > 20) continue;
      const int h = batch > 2 && type != DType::f32 ? 16 : 3;
      Case c{shape_of(type, batch == 1 ? 1 : 2, h, 64, 64), batch, 1, first};
      c.chunk_blocks = chunk_blocks;
      const Run run(c);
      CHECK(run.fused);
      check(run);
      c.ring = true;
      check(Run(c));
    }
  for (const int blocks : {16, 17, 18, 31, 32, 33, 61, 62, 63, 64, 93, 94, 125, 126, 256, 249, 1000})
    for (const int within : {0, 14, 15, 30, 31, 63}) {
      Case c{shape_of(DType::bf16, 1, 16, 128, 128), 1, 1, blocks * 64 + within};
      c.chunk_blocks = chunk_blocks;
      check(Run(c));
    }
  for (const int left_out : {cmp, sel, win})
    for (const auto& [batch, first] : {std::pair{1, 700}, {1, 20000}, {40, 3000}, {80, 1500}}) {
      Case c{shape_of(DType::bf16, 2, 16, 128, 128), batch, 1, first};
      c.left_out = left_out;
      c.chunk_blocks = chunk_blocks;
      check(Run(c));
      c.shape = shape_of(DType::f32, 2, 2, 64, 64);
      check(Run(c));
    }
}

// Blocks scored by tile: lse segments of one, two and three tiles, and of one and a half, which have no whole tiles;
// every count of tokens around the end of a tile; head counts that are no multiple of four; scores spread so far that
// the tokens of a tile are negligible next to its maximum; other geometries, of which only the first two are scored by
// tile.
TEST_CASE("blocks are scored by tile where lse segments have whole tiles", "[step]") {
  for (const DType type : {DType::bf16, DType::f32})
    for (const int chunk_blocks : {8, 12, 16, 24})
      for (const int h : {1, 3, 4})
        for (const std::int64_t first : {2047, 2048 + 14, 2048 + 15, 2048 + 16, 2048 + 31, 4096 + 30, 9000}) {
          Case c{shape_of(type, 1, h, 64, 64), 1, 1, first};
          c.chunk_blocks = chunk_blocks;
          c.q_scale = first == 9000 ? 16.0f : 2.0f;
          check(Run(c));
        }
  for (const BlockRules& r : {BlockRules{16, 8, 32, 16, 1, 2, 128},
                              {2, 1, 4, 12, 0, 1, 64},
                              {32, 16, 128, 16, 1, 2, 512},
                              {16, 16, 64, 16, 1, 2, 512},
                              {64, 16, 64, 16, 1, 2, 77}})
    for (const int h : {5, 16, 20})
      for (const std::int64_t first : {511, 1500, 3000}) {
        Case c{shape_of(DType::bf16, 2, h, 64, 64), 2, 1, first};
        c.shape.rules = r;
        c.chunk_blocks = 16;
        run_and_check(c);
        c.tokens = 9;
        run_and_check(c);
      }
}

TEST_CASE("cuda decode takes every head count and head size", "[shapes]") {
  int index = 0;
  for (const int h : {1, 3, 5, 7, 12, 17, 24, 32, 48, 64, 128})
    for (const int d : {16, 48, 80, 96, 112, 160, 192, 224, 256}) {
      ++index;
      Case c{shape_of(index % 3 == 0 ? DType::f16 : DType::bf16, 1 + index % 2, h, d, d), 1, 1, 2333};
      c.chunk_blocks = index % 4 == 0 ? 2 : 16;  // without and with whole tiles
      if (index % 5 == 0) {
        check_on_every_layout(c);
      } else {
        const Run run(c);
        CHECK(run.fused);
        check(run);
      }
    }
}

TEST_CASE("cuda decode takes every pair of head sizes and other selections", "[shapes]") {
  for (const auto& [d_k, d_v] :
       {std::pair{16, 256}, {80, 128}, {96, 64}, {128, 64}, {144, 128}, {192, 64}, {256, 32}, {32, 176}})
    for (const int h : {2, 16, 20}) check_on_every_layout({shape_of(DType::bf16, 2, h, d_k, d_v), 2, 1, 3001});
  for (const int h : {4, 16, 40})
    for (const int n : {17, 24, 32})
      for (const int l_sel : {32, 64, 128})
        for (const std::int64_t first : {900, 9000}) {
          Case c{shape_of(DType::bf16, 1, h, 128, 128), 1, 1, first};
          c.shape.rules.n_sel = n, c.shape.rules.l_sel = l_sel;
          c.chunk_blocks = 1024 / l_sel;
          check_on_every_layout(c);
        }
}

// Clusters of every size and CTAs without one; several tiles a warp; a branch left out.
TEST_CASE("a fused decode step of a padded instance equals its stages", "[shapes]") {
  const int chunk_blocks = GENERATE(2, 16);
  for (const auto& [h, d] :
       {std::pair{16, 96}, {5, 80}, {4, 256}, {16, 224}, {32, 128}, {24, 64}, {70, 128}, {40, 160}})
    for (const auto& [batch, first] :
         {std::pair{1, 33}, {1, 20000}, {2, 9000}, {7, 5000}, {20, 3000}, {70, 1999}, {150, 1111}}) {
      if (batch > 20 && h > 32) continue;
      Case c{shape_of(DType::bf16, 2, h, d, d), batch, 1, first};
      c.chunk_blocks = chunk_blocks;
      c.ring = batch % 2 == 0;
      const Run run(c);
      CHECK(run.fused);
      check(run);
    }
  for (const int left_out : {cmp, sel, win})
    for (const auto& [h, d] : {std::pair{16, 96}, {4, 256}, {32, 128}, {40, 256}})
      for (const auto& [batch, first] : {std::pair{1, 700}, {40, 3000}}) {
        Case c{shape_of(DType::bf16, 2, h, d, d), batch, 1, first};
        c.left_out = left_out;
        c.chunk_blocks = chunk_blocks;
        check(Run(c));
      }
}

// `fused` runs sel on the tiled kernel only where the rows of all groups and sequences fill it; cases on both sides.
TEST_CASE("cuda selected attention runs row by row where rows are few", "[prefill][variant]") {
  const AttendKernel& fused = gpu().kernels->attend[sel][0];
  for (const auto& [groups, batch] : {std::pair{1, 1}, {4, 1}, {1, 3}}) {
    Case c{shape_of(DType::bf16, groups, 4, 64, 64), batch, 1, 4000};
    const auto name = [&](std::int32_t tokens) {
      AttendArgs a;
      a.shape = c.shape;
      a.tile = {0, c.batch, tokens, nullptr, c.first + tokens};
      return std::string(fused.variant_name(a));
    };
    c.tokens = 2;
    while (c.tokens < 8192 && name(c.tokens + 1) == "rows") ++c.tokens;
    INFO("groups=" << groups << " batch=" << batch << " few rows are up to " << c.tokens << " tokens");
    CHECK(name(1) == "decode");
    CHECK(name(2) == "rows");
    if (gpu().capability == 90) CHECK(name(c.tokens + 1) == "tiled");
    CHECK(name(8192) == (gpu().capability == 90 ? "tiled" : "rows"));
    check(Run(c));
    ++c.tokens;
    check(Run(c));
  }
}

TEST_CASE("packed SDPA runs in the jobs that its scratch holds, matrix products elsewhere", "[variant][small]") {
  Case c{shape_of(DType::bf16, 2, 4, 64, 64), 1, 37, 1200};
  c.chunk_blocks = 16;  // the LSE segments of shape_of()
  const auto kernel_of = [&](Branch branch, std::size_t scratch_bytes) {
    AttendArgs a;
    a.shape = c.shape;
    a.tile = {0, c.batch, c.tokens, nullptr, c.positions()};
    a.scratch_bytes = scratch_bytes;
    return std::string(gpu().kernels->attend[branch][1].variant_name(a));
  };
  const AttendKernel& sdpa = gpu().kernels->attend[sel][1];
  const std::size_t all = sdpa.scratch(c.shape, {0, c.batch, c.tokens, nullptr, c.positions()}, {}),
                    row = std::size_t{16} * 64 * (64 + 64) * 2,  // packed K and V of a (row, group)
      rows = std::size_t{37} * 2 * row;
  for (const auto& [bytes, name] : {std::pair{all, "sdpa_split_kv"},
                                    {all - rows + 20 * row, "sdpa_split_kv"},  // several jobs, the last one shorter
                                    {all - rows - row, "sdpa_gemm"}}) {        // a fallback brings no scratch for it
    CHECK(kernel_of(sel, bytes) == name);
    c.max_scratch = bytes;
    check(Run(c, 1));
  }
  CHECK(kernel_of(cmp, all) == "sdpa_gemm");  // rank reads its scores
  CHECK(kernel_of(win, all) == "sdpa_gemm");  // several rows share a window
  c.tokens = 1;
  CHECK(kernel_of(win, all) == "sdpa_split_kv");
  c.shape.dtype = DType::f32;
  CHECK(kernel_of(win, all) == "sdpa_gemm");
  CHECK(kernel_of(sel, all) == "sdpa_gemm");
  c.shape = shape_of(DType::bf16, 2, 3, 10, 6);  // rows are no whole 16-byte vectors
  CHECK(kernel_of(sel, all) == "sdpa_gemm");
}

// Small enough for compute-sanitizer's slower tools: gpu_tests "[small]".
TEST_CASE("cuda attention of a few shapes", "[small]") {
  for (const DType type : {DType::f32, DType::bf16}) {
    Case c{shape_of(type, 2, 4, 64, 64), 1, 1, 700};
    run_and_check(c);
    c.tokens = 9;
    run_and_check(c);
    c.tokens = 1;
    c.kv = 2;
    c.ring = true;
    run_and_check(c);
    c.shape = shape_of(type, 1, 16, 128, 128);
    c.chunk_blocks = 8;
    run_and_check(c);
    c.kv = 1;
    c.first = 4200;
    run_and_check(c);
    c.chunk_blocks = 2;
    c.ring = false;
    c.first = 2100;
    c.tokens = 20;
    run_and_check(c);
  }
}
