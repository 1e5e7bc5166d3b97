#include "nsa/forward/stages.hpp"

#include "kernels/diagnostics/fault_injection.hpp"

namespace nsa {

namespace {

std::byte* at(const Buffer& buffer, std::int64_t elements, std::size_t size) {
  return buffer.as<std::byte>() + elements * static_cast<std::int64_t>(size);
}

float* floats_at(const Buffer& buffer, std::int64_t elements) {
  return buffer.data() ? buffer.as<float>() + elements : nullptr;
}

std::int32_t* selected_of(const StepContext& ctx) {
  const LayerShape& s = ctx.stage.shape;
  return ctx.buffers.selected.as<std::int32_t>() + ctx.layer * ctx.stage.tile.rows() * s.groups * s.rules.n_sel;
}

void* query_of(const StepContext& ctx) {
  const LayerShape& s = ctx.stage.shape;
  return at(ctx.buffers.q, ctx.first_row * s.heads() * s.d_k, size_of(s.dtype));
}

float* gate_of(const StepContext& ctx) {
  return floats_at(ctx.buffers.gate, ctx.first_row * ctx.stage.shape.groups * 3);
}

void flip(const char* site, const StepContext& ctx, const Buffer& buffer) {
  fault::flip(site, ctx.shard.device(), buffer.data(), buffer.bytes(), ctx.stream());
}

// Decode with several layers: output adds y to the residual stream where no other rank has a part of y. (A prefill tile
// may not: later tiles still project from it.)
bool adds_output(const StepContext& ctx) {
  return ctx.phase == Phase::decode && ctx.shard.config.model.layers > 1 && ctx.shard.partition.heads == 1 &&
         !ctx.one_launch;
}

ProjectArgs project_args(const StepContext& ctx) {
  const LayerShape& s = ctx.stage.shape;
  const StepBuffers& b = ctx.buffers;
  ProjectArgs args{ctx.stage};
  args.weights = ctx.shard.weights[ctx.layer].layer();
  args.x = at(b.x_in, ctx.first_row * s.dim, size_of(s.dtype));
  if (ctx.shard.config.model.layers > 1) args.residual = floats_at(b.x, ctx.first_row * s.dim);
  args.q = query_of(ctx);
  for (int c = 0; c < branches; ++c) {
    args.k[c] = b.k[c].data();
    args.v[c] = b.v[c].data();
  }
  args.gate = gate_of(ctx);
  args.force_branch = ctx.options.force_branch;
  return args;
}

AppendArgs append_args(const StepContext& ctx, Branch branch, const KvView& k_cache, const KvView& v_cache) {
  const Branch source = ctx.stage.shape.shared_kv ? sel : branch;
  return {ctx.stage, ctx.buffers.k[source].data(), ctx.buffers.v[source].data(), k_cache, v_cache};
}

// What a decode step appends, in the order of Branch.
void set_appends(const StepContext& ctx, AppendArgs (&append)[branches]) {
  const LayerCaches& cache = ctx.shard.caches[ctx.layer];
  append[cmp] = append_args(ctx, cmp, cache.raw.k, cache.raw.v);
  append[sel] = append_args(ctx, sel, cache.sel.k, cache.sel.v);
  append[win] = append_args(ctx, win, cache.win.k, cache.win.v);
}

CompressArgs compress_args(const StepContext& ctx) {
  const LayerCaches& cache = ctx.shard.caches[ctx.layer];
  CompressArgs args{ctx.stage};
  if (ctx.whole_layer()) {
    args.phi_k = ctx.shard.weights[ctx.layer].layer().phi_k;
    args.phi_v = ctx.shard.weights[ctx.layer].layer().phi_v;
  }
  args.k_raw = cache.raw.k;
  args.v_raw = cache.raw.v;
  args.k_cmp = cache.cmp.k;
  args.v_cmp = cache.cmp.v;
  args.fill_halo = true;
  return args;
}

PrologueArgs prologue_args(const StepContext& ctx) {
  PrologueArgs args;
  args.projects = ctx.whole_layer();
  if (args.projects) args.project = project_args(ctx);
  set_appends(ctx, args.append);
  args.compress = compress_args(ctx);
  return args;
}

AttendArgs attend_args(const StepContext& ctx, Branch branch) {
  const LayerShape& s = ctx.stage.shape;
  const QueryTile& tile = ctx.stage.tile;
  const StepBuffers& b = ctx.buffers;
  AttendArgs args{ctx.stage};
  args.q = query_of(ctx);
  args.k = ctx.k[branch];
  args.v = ctx.v[branch];
  args.out = partials_at(b.partials.as<float>(), s, tile.rows(), branch);
  args.reads = b.reads.as<std::int64_t>() + branch * ctx.shard.planes() + std::int64_t{tile.batch_begin} * s.groups;
  if (branch == sel) {
    args.selected = selected_of(ctx);
    if (ctx.exchanges_gated()) args.out = gated_partial_sel(b.partials.as<float>(), s, tile.rows());
  }
  if (branch == cmp) {
    args.lse = b.lse.as<float>();
    args.scores = b.scores.data();
    args.scores_only = ctx.leaves_out(cmp);
  }
  return args;
}

RankArgs rank_args(const StepContext& ctx) {
  const StepBuffers& b = ctx.buffers;
  RankArgs args{ctx.stage};
  args.scores = b.scores.data();
  args.local_attention = ctx.sharded;
  args.lse = (ctx.exchanges ? b.lse_all : b.lse).as<float>();
  args.lse_ranks = ctx.exchanges ? ctx.shard.partition.kv : 1;
  args.cmp_map = ctx.k[cmp].map;
  args.token_map = ctx.k[sel].map;
  args.q = query_of(ctx);
  args.k_cmp = ctx.k[cmp];
  args.cmp_ms = partials_at(b.partials.as<float>(), args.shape, args.tile.rows(), cmp).ms;
  if (ctx.exchanges)
    args.candidates = b.candidates.as<Candidate>();
  else
    args.selected = selected_of(ctx);
  if (ctx.options.record) {
    args.p_slc = b.p_slc.as<float>();
    args.p_slc_blocks = b.p_slc_blocks;
  }
  return args;
}

CombineArgs combine_args(const StepContext& ctx) {
  const StepBuffers& b = ctx.buffers;
  CombineArgs args{ctx.stage};
  args.partials = (ctx.exchanges ? b.partials_all : b.partials).as<float>();
  args.ranks = ctx.exchanges ? ctx.shard.partition.kv : 1;
  args.gate = gate_of(ctx);
  for (int c = 0; c < branches; ++c) {
    args.leave_out[c] = ctx.options.leave_out == c;
    if (ctx.options.record) args.o_branch[c] = b.o_branch[c].as<float>();
  }
  args.o = b.o.data();
  return args;
}

// The heads that o has on this rank.
HeadRange heads_of_o(const StepContext& ctx) {
  const LayerShape& s = ctx.stage.shape;
  const Partition& p = ctx.shard.partition;
  return ctx.one_launch ? finished_heads(s, p.kv, p.kv_rank) : HeadRange{0, s.heads()};
}

AttentionArgs attention_args(const StepContext& ctx) {
  return {{attend_args(ctx, cmp), attend_args(ctx, sel), attend_args(ctx, win)}, rank_args(ctx), combine_args(ctx)};
}

ShardedAttentionArgs sharded_args(const StepContext& ctx) {
  const StepBuffers& b = ctx.buffers;
  ShardedAttentionArgs args;
  for (const Branch branch : {cmp, win}) args.attend[branch] = attend_args(ctx, branch);
  args.lse_all = b.lse_all.as<float>();
  if (ctx.exchanges_gated()) args.gated = b.partials.as<float>();
  args.gated_all = b.partials_all.as<float>();
  args.combine = combine_args(ctx);
  return args;
}

StepEnds step_ends(const StepContext& ctx, const AdvanceArgs& log, bool ends_step) {
  StepEnds ends;
  set_appends(ctx, ends.append);
  ends.compress = compress_args(ctx);
  ends.log = log;
  ends.first_position = ctx.shard.point.context;
  ends.ends_step = ends_step;
  return ends;
}

ShardedStepArgs step_args(const StepContext& ctx) {
  ShardedStepArgs args{attention_args(ctx), ctx.shard.comms->kv.peer_memory()};
  args.attention.rank.candidates = nullptr;
  args.attention.rank.selected = selected_of(ctx);
  args.readings = ctx.options.readings;
  return args;
}

const FusedOp<AttentionArgs>& attention_op(const StepContext& ctx) {
  const KernelTable& kernels = ctx.shard.kernels();
  return ctx.phase == Phase::decode ? kernels.decode_attention : kernels.prefill_attention;
}

DecodeLayerArgs layer_args(const StepContext& ctx, const AdvanceArgs& log, bool ends_step) {
  DecodeLayerArgs args{step_ends(ctx, log, ends_step)};
  args.projects = ctx.whole_layer();
  if (args.projects) args.project = project_args(ctx);
  args.attention = attention_args(ctx);
  return args;
}

void run_sharded_step(const StepContext& ctx, const ShardedStepArgs& args) {
  const std::int64_t floats = gated_partial_floats(ctx.stage.shape, ctx.stage.tile.rows());
  ctx.shard.comms->kv.exchange_in_kernel("sharded step", static_cast<std::size_t>(floats) * 4,
                                         [&] { ctx.shard.kernels().sharded_step.run(args, ctx.stream()); });
  for (const Branch b : {cmp, sel, win}) ctx.shard.routes.of(ctx.phase, b).record_kernel("sharded_step");
  flip("kernel.combine", ctx, ctx.buffers.o);
}

// A fused operation computes what the first implementation of each branch does; the input may ask for another one.
bool routed_to_first(const StepContext& ctx, std::initializer_list<Branch> of) {
  for (const Branch b : of)
    if (ctx.shard.routes.of(ctx.phase, b).kernel != &ctx.shard.kernels().attend[b].front()) return false;
  return true;
}

}  // namespace

void project(const StepContext& ctx) { ctx.shard.kernels().project(project_args(ctx), ctx.stream()); }

void append(const StepContext& ctx, Branch branch, const KvView& k_cache, const KvView& v_cache) {
  ctx.shard.kernels().append(append_args(ctx, branch, k_cache, v_cache), ctx.stream());
}

void compress(const StepContext& ctx) { ctx.shard.kernels().compress(compress_args(ctx), ctx.stream()); }

void attend(const StepContext& ctx, Branch branch) {
  ctx.shard.routes.of(ctx.phase, branch).run(branch, attend_args(ctx, branch), ctx.stream());
  flip("kernel.attend", ctx, ctx.buffers.partials);
  flip("kernel.reads", ctx, ctx.buffers.reads);
}

void score_blocks(const StepContext& ctx) {
  ctx.shard.kernels().rank(rank_args(ctx), ctx.stream());
  flip("kernel.rank", ctx, ctx.buffers.selected);
}

void select_blocks(const StepContext& ctx) {
  ctx.shard.kernels().select(
      {ctx.stage, ctx.buffers.candidates_all.as<Candidate>(), ctx.shard.partition.kv, selected_of(ctx)}, ctx.stream());
}

void combine(const StepContext& ctx) {
  ctx.shard.kernels().combine(combine_args(ctx), ctx.stream());
  flip("kernel.combine", ctx, ctx.buffers.o);
}

void output(const StepContext& ctx) {
  OutputArgs args{ctx.stage, heads_of_o(ctx)};
  args.o = ctx.buffers.o.data();
  args.w_o = ctx.shard.weights[ctx.layer].layer().w_o;
  args.y = floats_at(ctx.buffers.y, ctx.first_row * args.shape.dim);
  if (adds_output(ctx)) args.residual = floats_at(ctx.buffers.x, ctx.first_row * args.shape.dim);
  ctx.shard.kernels().output(args, ctx.stream());
  flip("kernel.output", ctx, ctx.buffers.y);
}

bool has_fused_prologue(const StepContext& ctx) {
  const FusedOp<PrologueArgs>& op = ctx.shard.kernels().prologue;
  return op.accepts && op.accepts(prologue_args(ctx));
}

void fused_prologue(const StepContext& ctx) { ctx.shard.kernels().prologue.run(prologue_args(ctx), ctx.stream()); }

bool has_fused_attention(const StepContext& ctx) {
  const FusedOp<AttentionArgs>& op = attention_op(ctx);
  return op.accepts && !ctx.exchanges && routed_to_first(ctx, {cmp, sel, win}) && op.accepts(attention_args(ctx));
}

void fused_attention(const StepContext& ctx) {
  fault::refuse_launch("attend.step", ctx.shard.device(), ctx.stream());
  const FusedOp<AttentionArgs>& op = attention_op(ctx);
  const AttentionArgs args = attention_args(ctx);
  op.run(args, ctx.stream());
  const char* kernel = op.variant ? op.variant(args) : "step";
  for (const Branch b : {cmp, sel, win}) ctx.shard.routes.of(ctx.phase, b).record_kernel(kernel);
  flip("kernel.combine", ctx, ctx.buffers.o);
}

bool has_decode_layer(const StepContext& ctx, const AdvanceArgs& log) {
  if (ctx.exchanges) {
    ShardedStepArgs args = step_args(ctx);
    args.ends = step_ends(ctx, log, false);
    return has_sharded_step(ctx) && ctx.shard.kernels().sharded_step.accepts(args);
  }
  const FusedOp<DecodeLayerArgs>& op = ctx.shard.kernels().decode_layer;
  return op.accepts && routed_to_first(ctx, {cmp, sel, win}) && op.accepts(layer_args(ctx, log, false));
}

void decode_layer(const StepContext& ctx, const AdvanceArgs& log, bool ends_step) {
  if (ctx.exchanges) {
    if (ctx.whole_layer()) project(ctx);
    ShardedStepArgs args = step_args(ctx);
    args.ends = step_ends(ctx, log, ends_step);
    return run_sharded_step(ctx, args);
  }
  fault::refuse_launch("attend.step", ctx.shard.device(), ctx.stream());
  ctx.shard.kernels().decode_layer.run(layer_args(ctx, log, ends_step), ctx.stream());
  for (const Branch b : {cmp, sel, win}) ctx.shard.routes.of(ctx.phase, b).record_kernel("step");
  flip("kernel.combine", ctx, ctx.buffers.o);
}

bool has_sharded_attention(const StepContext& ctx) {
  const ShardedAttention& op = ctx.shard.kernels().sharded_attention;
  return op.accepts && ctx.exchanges && routed_to_first(ctx, {cmp, win}) && op.accepts(sharded_args(ctx));
}

bool has_sharded_step(const StepContext& ctx) {
  if (!may_run_in_one_launch(ctx.shard.partition.kv)) return false;
  const FusedOp<ShardedStepArgs>& op = ctx.shard.kernels().sharded_step;
  return op.accepts && ctx.exchanges && routed_to_first(ctx, {cmp, sel, win}) && op.accepts(step_args(ctx));
}

void sharded_step(const StepContext& ctx) { run_sharded_step(ctx, step_args(ctx)); }

void try_sharded_step(const StepContext& ctx) {
  fault::refuse_launch("attend.step", ctx.shard.device(), ctx.stream());
  ShardedStepArgs args = step_args(ctx);
  args.exchanges = false;
  ctx.shard.kernels().sharded_step.run(args, ctx.stream());
}

void local_attention(const StepContext& ctx) {
  fault::refuse_launch("attend.shard", ctx.shard.device(), ctx.stream());
  ctx.shard.kernels().sharded_attention.local_attention(sharded_args(ctx), ctx.stream());
  for (const Branch b : {cmp, win}) ctx.shard.routes.of(ctx.phase, b).record_kernel("shard");
}

void normalise_partials(const StepContext& ctx, Stream* stream) {
  ctx.shard.kernels().sharded_attention.normalise_partials(sharded_args(ctx), stream);
}

void merge_ranks(const StepContext& ctx) {
  ctx.shard.kernels().sharded_attention.merge_ranks(sharded_args(ctx), ctx.stream());
  flip("kernel.combine", ctx, ctx.buffers.o);
}

void exchange_lse(const StepContext& ctx, Stream* stream) {
  const StepBuffers& b = ctx.buffers;
  ctx.shard.comms->kv.all_gather("lse", b.lse.data(), b.lse_all.data(), b.lse.bytes(), stream);
}

void exchange_candidates(const StepContext& ctx, Stream* stream) {
  const StepBuffers& b = ctx.buffers;
  ctx.shard.comms->kv.all_gather("candidates", b.candidates.data(), b.candidates_all.data(), b.candidates.bytes(),
                                 stream);
}

void exchange_partials(const StepContext& ctx, Stream* stream) {
  const StepBuffers& b = ctx.buffers;
  const bool gated = ctx.exchanges_gated();
  const std::int64_t floats = gated_partial_floats(ctx.stage.shape, ctx.stage.tile.rows());
  ctx.shard.comms->kv.all_gather(gated ? "gated partials" : "partials", b.partials.data(), b.partials_all.data(),
                                 gated ? static_cast<std::size_t>(floats) * 4 : b.partials.bytes(), stream);
}

void align_ranks(const StepContext& ctx) {
  const StepBuffers& b = ctx.buffers;
  ctx.shard.comms->kv.all_gather("start", b.candidates.data(), b.candidates_all.data(), 16, ctx.stream());
}

void gather_heads(const StepContext& ctx) {
  const LayerShape& s = ctx.stage.shape;
  const StepBuffers& b = ctx.buffers;
  const std::int32_t ranks = ctx.shard.partition.kv;
  const std::int64_t rows = ctx.stage.tile.rows(), head_bytes = s.d_v * static_cast<std::int64_t>(size_of(s.dtype)),
                     bytes = rows * ((s.heads() + ranks - 1) / ranks) * head_bytes;
  const auto* all = b.partials_all.as<std::byte>();
  ctx.shard.comms->kv.all_gather("heads of o", b.o.data(), b.partials_all.data(), static_cast<std::size_t>(bytes),
                                 ctx.stream());
  for (std::int32_t rank = 0; rank < ranks; ++rank) {
    const HeadRange heads = finished_heads(s, ranks, rank);
    for (std::int64_t row = 0; row < rows; ++row)
      ctx.shard.device().copy(b.o.as<std::byte>() + (row * s.heads() + heads.first) * head_bytes,
                              all + rank * bytes + row * heads.count * head_bytes,
                              static_cast<std::size_t>(heads.count * head_bytes), ctx.stream());
  }
}

void sum_outputs(const StepContext& ctx, std::int64_t rows) {
  const auto count = static_cast<std::size_t>(rows * ctx.stage.shape.dim);
  const std::int64_t first = ctx.first_row * ctx.stage.shape.dim;
  float* y = floats_at(ctx.buffers.y, first);
  if (ctx.one_launch) ctx.shard.comms->kv.all_reduce_sum("outputs", y, count, ctx.stream());
  ctx.shard.comms->heads.all_reduce_sum("outputs", y, count, ctx.stream());
  if (ctx.shard.config.model.layers > 1 && !adds_output(ctx))
    ctx.shard.kernels().add(static_cast<std::int64_t>(count), floats_at(ctx.buffers.x, first), y, ctx.stream());
}

}  // namespace nsa
