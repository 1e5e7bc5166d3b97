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

std::int32_t* selected_of(const StepContext& w) {
  const LayerShape& s = w.engine.shape();
  return w.buffers.selected.as<std::int32_t>() + w.layer * w.tile.rows() * s.groups * s.rules.n_sel;
}

void* query_of(const StepContext& w) {
  const LayerShape& s = w.engine.shape();
  return at(w.buffers.q, w.first_row * s.heads() * s.d_k, size_of(s.dtype));
}

void flip(const char* site, const StepContext& w, const Buffer& buffer) {
  fault::flip(site, w.engine.device(), buffer.data(), buffer.bytes(), w.engine.streams.compute);
}

float* gate_of(const StepContext& w) { return floats_at(w.buffers.gate, w.first_row * w.engine.shape().groups * 3); }

void normalise(StepContext& w) {
  if (w.engine.config.model.layers == 1) return;
  const LayerShape& s = w.engine.shape();
  void* x_in = at(w.buffers.x_in, w.first_row * s.dim, size_of(s.dtype));
  w.engine.kernels().rmsnorm(s, w.tile.rows(), floats_at(w.buffers.x, w.first_row * s.dim), x_in, true,
                             w.engine.streams.compute);
}

ProjectArgs project_args(const StepContext& w) {
  const LayerShape& s = w.engine.shape();
  const StepBuffers& b = w.buffers;
  ProjectArgs args;
  args.shape = s;
  args.tile = w.tile;
  args.weights = w.engine.weights[w.layer].layer();
  args.x = at(b.x_in, w.first_row * s.dim, size_of(s.dtype));
  args.q = query_of(w);
  for (int c = 0; c < branches; ++c) {
    args.k[c] = b.k[c].data();
    args.v[c] = b.v[c].data();
  }
  args.gate = gate_of(w);
  args.force_branch = w.options.force_branch;
  args.scratch = b.scratch.data();
  args.scratch_bytes = b.scratch.bytes();
  return args;
}

AppendArgs append_args(const StepContext& w, Branch branch, const KvView& k_cache, const KvView& v_cache) {
  const LayerShape& s = w.engine.shape();
  const Branch source = s.shared_kv ? sel : branch;
  return {s, w.tile, w.buffers.k[source].data(), w.buffers.v[source].data(), k_cache, v_cache};
}

AttendArgs attend_args(const StepContext& w, Branch branch) {
  const LayerShape& s = w.engine.shape();
  const StepBuffers& b = w.buffers;
  AttendArgs args;
  args.shape = s;
  args.tile = w.tile;
  args.q = query_of(w);
  args.k = w.k[branch];
  args.v = w.v[branch];
  args.out = partials_at(b.partials.as<float>(), s, w.tile.rows(), branch);
  args.reads = b.reads.as<std::int64_t>() + branch * w.engine.planes() + std::int64_t{w.tile.batch_begin} * s.groups;
  args.scratch = b.scratch.data();
  args.scratch_bytes = b.scratch.bytes();
  if (branch == sel) {
    args.selected = selected_of(w);
    if (w.weighted) args.out = weighted_sel(b.partials.as<float>(), s, w.tile.rows());
  }
  if (branch == cmp) {
    args.lse = b.lse.as<float>();
    args.scores = b.scores.data();
    args.scores_only = w.leaves_out(cmp);
  }
  return args;
}

RankArgs rank_args(const StepContext& w) {
  const StepBuffers& b = w.buffers;
  RankArgs args;
  args.shape = w.engine.shape();
  args.tile = w.tile;
  args.scores = b.scores.data();
  args.opened = w.opened;
  args.lse = (w.exchange ? b.lse_all : b.lse).as<float>();
  args.lse_ranks = w.exchange ? w.engine.partition.kv : 1;
  args.cmp_map = w.k[cmp].map;
  args.token_map = w.k[sel].map;
  args.q = query_of(w);
  args.k_cmp = w.k[cmp];
  args.cmp_ms = partials_at(b.partials.as<float>(), args.shape, w.tile.rows(), cmp).ms;
  if (w.exchange)
    args.candidates = b.candidates.as<Candidate>();
  else
    args.selected = selected_of(w);
  if (w.options.record) {
    args.p_slc = b.p_slc.as<float>();
    args.p_slc_blocks = b.p_slc_blocks;
  }
  args.scratch = b.scratch.data();
  args.scratch_bytes = b.scratch.bytes();
  return args;
}

CompressArgs compress_args(const StepContext& w) {
  const LayerCaches& cache = w.engine.caches[w.layer];
  CompressArgs args;
  args.shape = w.engine.shape();
  args.tile = w.tile;
  if (w.whole_layer()) {
    args.phi_k = w.engine.weights[w.layer].layer().phi_k;
    args.phi_v = w.engine.weights[w.layer].layer().phi_v;
  }
  args.k_raw = cache.raw.k;
  args.v_raw = cache.raw.v;
  args.k_cmp = cache.cmp.k;
  args.v_cmp = cache.cmp.v;
  args.fill_halo = true;
  args.scratch = w.buffers.scratch.data();
  args.scratch_bytes = w.buffers.scratch.bytes();
  return args;
}

CombineArgs combine_args(const StepContext& w) {
  const StepBuffers& b = w.buffers;
  CombineArgs args;
  args.shape = w.engine.shape();
  args.tile = w.tile;
  args.partials = (w.exchange ? b.partials_all : b.partials).as<float>();
  args.ranks = w.exchange ? w.engine.partition.kv : 1;
  args.gate = gate_of(w);
  for (int c = 0; c < branches; ++c) {
    args.leave_out[c] = w.options.leave_out == c;
    if (w.options.record) args.o_branch[c] = b.o_branch[c].as<float>();
  }
  args.o = b.o.data();
  return args;
}

ShardedAttentionArgs shard_args(const StepContext& w) {
  const StepBuffers& b = w.buffers;
  ShardedAttentionArgs args;
  for (const Branch branch : {cmp, win}) args.attend[branch] = attend_args(w, branch);
  args.lse_all = b.lse_all.as<float>();
  if (w.weighted) args.weighted = b.partials.as<float>();
  args.gathered = b.partials_all.as<float>();
  args.combine = combine_args(w);
  return args;
}

}  // namespace

void project(StepContext& w) {
  normalise(w);
  w.engine.kernels().project(project_args(w), w.engine.streams.compute);
}

void append(StepContext& w, Branch branch, const KvView& k_cache, const KvView& v_cache) {
  w.engine.kernels().append(append_args(w, branch, k_cache, v_cache), w.engine.streams.compute);
}

void compress(StepContext& w) { w.engine.kernels().compress(compress_args(w), w.engine.streams.compute); }

bool enter_at_once(StepContext& w) {
  if (!w.engine.kernels().decode_prologue) return false;
  const LayerCaches& cache = w.engine.caches[w.layer];
  PrologueArgs args;
  args.projects = w.whole_layer();
  if (args.projects) {
    normalise(w);
    args.project = project_args(w);
  }
  args.append[cmp] = append_args(w, cmp, cache.raw.k, cache.raw.v);
  args.append[sel] = append_args(w, sel, cache.sel.k, cache.sel.v);
  args.append[win] = append_args(w, win, cache.win.k, cache.win.v);
  args.compress = compress_args(w);
  w.engine.kernels().decode_prologue(args, w.engine.streams.compute);
  return true;
}

void attend(StepContext& w, Branch branch) {
  w.engine.routes.of(w.phase, branch).run(branch, attend_args(w, branch), w.engine.streams.compute);
  flip("kernel.attend", w, w.buffers.partials);
  flip("kernel.reads", w, w.buffers.reads);
}

void rank_blocks(StepContext& w) {
  w.engine.kernels().rank(rank_args(w), w.engine.streams.compute);
  flip("kernel.rank", w, w.buffers.selected);
}

void select_blocks(StepContext& w) {
  w.engine.kernels().select(
      {w.engine.shape(), w.tile, w.buffers.candidates_all.as<Candidate>(), w.engine.partition.kv, selected_of(w)},
      w.engine.streams.compute);
}

void combine(StepContext& w) {
  if (w.weighted)
    w.engine.kernels().sharded->combine(shard_args(w), w.engine.streams.compute);
  else
    w.engine.kernels().combine(combine_args(w), w.engine.streams.compute);
  flip("kernel.combine", w, w.buffers.o);
}

bool attend_at_once(StepContext& w) {
  const KernelTable& kernels = w.engine.kernels();
  const bool decodes = w.phase == Phase::decode;
  const auto accepts = decodes ? kernels.decode_step_accepts : kernels.prefill_step_accepts;
  const auto run = decodes ? kernels.decode_step : kernels.prefill_step;
  bool& works = w.engine.routes.steps_at_once[static_cast<int>(w.phase)];
  if (!run || w.exchange) return false;
  AttentionArgs args;
  for (const Branch b : {cmp, sel, win}) {
    if (w.engine.routes.of(w.phase, b).kernel != &kernels.attend[b].front())
      return false;  // another implementation was asked for
    args.attend[b] = attend_args(w, b);
  }
  args.rank = rank_args(w);
  args.combine = combine_args(w);
  if (!works || !accepts(args)) return false;
  try {
    fault::refuse_launch("attend.step", w.engine.device(), w.engine.streams.compute);
    run(args, w.engine.streams.compute);
  } catch (const LaunchError&) {
    works = false;  // the stages one by one do the same, and fall back where they must
    return false;
  }
  for (const Branch b : {cmp, sel, win}) w.engine.routes.of(w.phase, b).record_kernel("step");
  flip("kernel.combine", w, w.buffers.o);
  return true;
}

bool shards_at_once(StepContext& w) {
  const KernelTable& kernels = w.engine.kernels();
  if (!w.exchange || !kernels.sharded) return false;
  for (const Branch b : {cmp, win})
    if (w.engine.routes.of(w.phase, b).kernel != &kernels.attend[b].front()) return false;
  return kernels.sharded->accepts(shard_args(w));
}

void open_shard(StepContext& w) {
  fault::refuse_launch("attend.shard", w.engine.device(), w.engine.streams.compute);
  w.engine.kernels().sharded->open(shard_args(w), w.engine.streams.compute);
  w.opened = true;
  for (const Branch b : {cmp, win}) w.engine.routes.of(w.phase, b).record_kernel("shard");
}
void weigh_shard(StepContext& w, Stream* stream) { w.engine.kernels().sharded->weigh(shard_args(w), stream); }

void output(StepContext& w) {
  const LayerShape& s = w.engine.shape();
  const StepBuffers& b = w.buffers;
  OutputArgs args;
  args.shape = s;
  args.rows = w.tile.rows();
  args.o = b.o.data();
  args.w_o = w.engine.weights[w.layer].layer().w_o;
  args.y = floats_at(b.y, w.first_row * s.dim);
  args.scratch = b.scratch.data();
  args.scratch_bytes = b.scratch.bytes();
  w.engine.kernels().output(args, w.engine.streams.compute);
  flip("kernel.output", w, b.y);
}

void exchange_lse(StepContext& w, Stream* stream) {
  w.engine.comms->kv.all_gather("lse", w.buffers.lse.data(), w.buffers.lse_all.data(), w.buffers.lse.bytes(), stream);
}

void exchange_candidates(StepContext& w, Stream* stream) {
  w.engine.comms->kv.all_gather("candidates", w.buffers.candidates.data(), w.buffers.candidates_all.data(),
                                w.buffers.candidates.bytes(), stream);
}

void exchange_partials(StepContext& w, Stream* stream) {
  const std::int64_t floats = weighted_floats(w.engine.shape(), w.tile.rows());
  w.engine.comms->kv.all_gather(w.weighted ? "weighted partials" : "partials", w.buffers.partials.data(),
                                w.buffers.partials_all.data(),
                                w.weighted ? static_cast<std::size_t>(floats) * 4 : w.buffers.partials.bytes(), stream);
}

void sum_outputs(StepContext& w, std::int64_t rows) {
  const auto count = static_cast<std::size_t>(rows * w.engine.shape().dim);
  Stream* stream = w.engine.streams.compute;
  w.engine.comms->heads.all_reduce_sum("outputs", w.buffers.y.as<float>(), count, stream);
  if (w.engine.config.model.layers > 1)
    w.engine.kernels().add(static_cast<std::int64_t>(count), w.buffers.x.as<float>(), w.buffers.y.as<float>(), stream);
}

}  // namespace nsa
