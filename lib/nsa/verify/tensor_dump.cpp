#include "nsa/verify/tensor_dump.hpp"

#include <algorithm>

#include "nsa/model/inputs.hpp"

namespace nsa {

SharedTensor::SharedTensor(std::string name, std::vector<std::int64_t> shape, std::vector<std::string> dims,
                           std::int64_t rows)
    : rows_(rows) {
  const std::int64_t elements = elements_of(shape);
  columns_ = rows > 0 ? elements / (shape[0] * rows) : 0;
  record_ = {std::move(name), std::move(shape), std::move(dims), std::vector<float>(elements), {}};
}

void SharedTensor::store(std::int64_t b, std::int64_t row, std::int64_t column, const float* values,
                         std::int64_t count) {
  std::copy_n(values, count, record_.values.begin() + (b * rows_ + row) * columns_ + column);
}

TensorRecord SharedTensor::reduce(const ControlComm& world, bool as_integers) {
  world.sum(record_.values);
  if (as_integers) {
    record_.integers.assign(record_.values.begin(), record_.values.end());
    record_.values.clear();
  }
  return std::move(record_);
}

StepTensors::StepTensors(ModelShard& shard, std::int64_t positions)
    : StepTensors(shard, positions, shard.config.output.tensors ? positions : 0) {}

StepTensors::StepTensors(ModelShard& shard, std::int64_t selections, std::int64_t positions)
    : shard_(shard),
      q_("q", {shard.point.batch, positions, shard.config.model.n_heads, shard.config.model.d_k},
         {"batch", "row", "head", "d_k"}, positions),
      gate_("gate", {shard.point.batch, positions, shard.config.model.n_kv_groups, 3},
            {"batch", "row", "group", "branch"}, positions),
      p_slc_("p_slc",
             {shard.point.batch, positions, shard.config.model.n_kv_groups,
              eligible_blocks(shard.shape().rules, total_positions(shard.config, shard.point) - 1)},
             {"batch", "row", "group", "block"}, positions),
      selected_("selected", {shard.point.batch, selections, shard.config.model.n_kv_groups, shard.shape().rules.n_sel},
                {"batch", "row", "group", "choice"}, selections),
      o_("o", {shard.point.batch, positions, shard.config.model.n_heads, shard.config.model.d_v},
         {"batch", "row", "head", "d_v"}, positions),
      y_("y", {shard.point.batch, positions, shard.config.run.scope == Scope::layer ? shard.config.model.dim : 0},
         {"batch", "row", "dim"}, positions) {
  for (const char* branch : branch_names)
    o_branch_.emplace_back(
        std::string("o_") + branch,
        std::vector<std::int64_t>{shard.point.batch, positions, shard.config.model.n_heads, shard.config.model.d_v},
        std::vector<std::string>{"batch", "row", "head", "d_v"}, positions);
}

void StepTensors::take(const StepContext& ctx, std::int64_t row, bool shared) {
  const LayerShape& s = shard_.shape();
  const StepBuffers& b = ctx.buffers;
  const std::int64_t rows = ctx.stage.tile.rows(), heads = s.heads(),
                     first_head = std::int64_t{shard_.partition.group_begin} * s.heads_per_group;
  const auto store = [&](SharedTensor& to, const std::vector<float>& values, std::int64_t column) {
    const std::int64_t width = static_cast<std::int64_t>(values.size()) / rows;
    for (std::int64_t r = 0; r < rows; ++r)
      to.store(ctx.stage.tile.batch_begin + r / ctx.stage.tile.tokens, row + r % ctx.stage.tile.tokens, column,
               values.data() + r * width, width);
  };
  const bool all = shard_.config.output.tensors;
  if (all && ctx.ranks_blocks())
    store(p_slc_, download(shard_, b.p_slc.data(), rows * s.groups * b.p_slc_blocks, DType::f32),
          shard_.partition.group_begin * b.p_slc_blocks);
  if (shared && shard_.partition.kv_rank != 0) return;
  const std::int64_t choices = rows * s.groups * s.rules.n_sel;
  const auto selected =
      download_ints(shard_, b.selected.as<std::int32_t>() + (shard_.config.model.layers - 1) * choices, choices);
  store(selected_, {selected.begin(), selected.end()}, std::int64_t{shard_.partition.group_begin} * s.rules.n_sel);
  if (!all) return;
  const std::int64_t q_width = heads * s.d_k, size = static_cast<std::int64_t>(size_of(s.dtype));
  store(q_, download(shard_, b.q.as<std::byte>() + ctx.first_row * q_width * size, rows * q_width, s.dtype),
        first_head * s.d_k);
  store(gate_, download(shard_, b.gate.as<float>() + ctx.first_row * s.groups * 3, rows * s.groups * 3, DType::f32),
        shard_.partition.group_begin * 3);
  store(o_, download(shard_, b.o.data(), rows * heads * s.d_v, s.dtype), first_head * s.d_v);
  for (int c = 0; c < branches; ++c)
    store(o_branch_[c], download(shard_, b.o_branch[c].data(), rows * heads * s.d_v, DType::f32), first_head * s.d_v);
  // Prefill records a tile before the outputs of the head shards are summed; each head shard stores its own.
  if (ctx.whole_layer() && (!shared || shard_.partition.head_shard == 0))
    store(y_, download(shard_, b.y.as<float>() + ctx.first_row * s.dim, rows * s.dim, DType::f32), 0);
}

std::vector<TensorRecord> StepTensors::reduce(const ControlComm& world) {
  std::vector<TensorRecord> list;
  list.push_back(selected_.reduce(world, true));
  if (!shard_.config.output.tensors) return list;
  list.push_back(q_.reduce(world));
  list.push_back(gate_.reduce(world));
  list.push_back(p_slc_.reduce(world));
  for (SharedTensor& branch : o_branch_) list.push_back(branch.reduce(world));
  list.push_back(o_.reduce(world));
  if (shard_.config.run.scope == Scope::layer) list.push_back(y_.reduce(world));
  return list;
}

std::vector<TensorRecord> input_tensors(const ModelShard& shard, const TensorSource& source, bool on_this_rank) {
  std::vector<TensorRecord> list;
  if (!on_this_rank) return list;
  const auto add = [&](const std::string& name, const std::vector<std::int64_t>& shape, float scale,
                       std::vector<std::string> dims, DType type) {
    const std::vector<float> values =
        source.slab(name, shape, scale, std::vector<std::int64_t>(shape.size(), 0), shape);
    list.push_back(
        {name, shape, std::move(dims), from_storage(to_storage(values, type).data(), values.size(), type), {}});
  };
  const DType storage = shard.shape().dtype;
  if (shard.config.run.scope == Scope::attention) {
    Partition whole = shard.partition;
    whole.shape.groups = static_cast<std::int32_t>(shard.config.model.n_kv_groups);
    add("given/q", q_columns(shard.config, shard.point, whole).shape, 1, {"batch", "position", "head", "d_k"}, storage);
    add("given/gate", gate_columns(shard.config, shard.point, whole).shape, 1, {"batch", "position", "group", "branch"},
        DType::f32);
    for (const Branch c : kv_column_order)
      for (const bool value : {false, true})
        if (!shard.shape().shared_kv || c == sel)
          add(kv_name(shard.shape(), c, value), kv_columns(shard.config, shard.point, whole, value).shape, 1,
              {"batch", "position", "group", value ? "d_v" : "d_k"}, storage);
    return list;
  }
  add("x", x_columns(shard.config, shard.point).shape, 1, {"batch", "position", "dim"},
      shard.config.model.layers > 1 ? DType::f32 : storage);  // the residual stream starts from x as it is
  for (std::int64_t layer = 0; layer < shard.config.model.layers; ++layer)
    for (const WeightSpec& w : weight_specs(shard.config, layer)) {
      std::vector<std::string> dims;
      for (std::size_t i = 0; i < w.shape.size(); ++i)
        dims.push_back(w.name.substr(w.name.rfind('/') + 1) + "_" + std::to_string(i));
      add(w.name, w.shape, w.scale, dims, w.name.find("gate_") != std::string::npos ? DType::f32 : storage);
    }
  return list;
}

std::vector<TensorRecord> compressed_tensors(ModelShard& shard, const std::vector<std::int64_t>& ends,
                                             const ControlComm& world) {
  const Partition& p = shard.partition;
  const LayerShape& s = p.shape;
  const std::int64_t tokens = compressed_tokens(s.rules, *std::ranges::max_element(ends) - 1);
  std::vector<TensorRecord> list;
  for (const bool value : {false, true}) {
    const KvView view = on_host(value ? shard.caches.back().cmp.v : shard.caches.back().cmp.k);
    SharedTensor all(value ? "v_cmp_tokens" : "k_cmp_tokens",
                     {shard.point.batch, tokens, shard.config.model.n_kv_groups, view.width},
                     {"batch", "compressed_token", "group", value ? "d_v" : "d_k"}, tokens);
    for (std::int64_t plane = 0; plane < shard.planes(); ++plane) {
      const std::int64_t end = ends[static_cast<std::size_t>(plane / s.groups)];
      for (std::int64_t i = 0; i < compressed_tokens(s.rules, end - 1); ++i) {
        if (p.kv > 1 && owner_of_chunk(view.map, chunk_of(view.map, i)) != p.kv_rank) continue;
        StoredRows stored = empty_rows(1, view, s.dtype);
        get_row(shard, view, plane, i, stored, 0);
        shard.device().synchronize(shard.streams.compute);
        const std::vector<float> row = from_cache(stored, view, s.dtype);
        all.store(plane / s.groups, i, (p.group_begin + plane % s.groups) * view.width, row.data(), view.width);
      }
    }
    list.push_back(all.reduce(world));
  }
  return list;
}

}  // namespace nsa
