#include "nsa/model/weights.hpp"

#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>

#include "kernels/diagnostics/error.hpp"
#include "kernels/shared/float16.hpp"

namespace nsa {

namespace {

template <class T>
std::vector<std::byte> rounded(const std::vector<float>& values) {
  std::vector<std::byte> bytes(values.size() * sizeof(T));
  T* to = reinterpret_cast<T*>(bytes.data());
  for (std::size_t i = 0; i < values.size(); ++i) to[i] = from_float<T>(values[i]);
  return bytes;
}

template <class T>
std::vector<float> widened(const void* data, std::size_t count) {
  std::vector<float> values(count);
  const T* from = static_cast<const T*>(data);
  for (std::size_t i = 0; i < count; ++i) values[i] = to_float(from[i]);
  return values;
}

}  // namespace

std::int64_t elements_of(const std::vector<std::int64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
}

std::vector<std::byte> to_storage(const std::vector<float>& values, DType type) {
  return type == DType::f32    ? rounded<float>(values)
         : type == DType::bf16 ? rounded<Bf16>(values)
                               : rounded<Fp16>(values);
}

std::vector<float> from_storage(const void* data, std::size_t count, DType type) {
  return type == DType::f32    ? widened<float>(data, count)
         : type == DType::bf16 ? widened<Bf16>(data, count)
                               : widened<Fp16>(data, count);
}

TensorSource::TensorSource(const Config& config, const std::string& file)
    : seed_(static_cast<std::uint64_t>(config.run.seed)),
      repeat_(repeats(config.run.overlap)),
      shared_prefix_(config.cache.shared_prefix) {
  if (!file.empty()) file_ = std::make_unique<TensorFile>(file);
}

std::int64_t TensorSource::shared_rows(const std::string& name) const {
  return name == "x" || name.starts_with("given/") ? shared_prefix_ : 0;
}

std::vector<float> TensorSource::read_file(const std::string& name, const std::vector<std::int64_t>& shape,
                                           const std::vector<std::int64_t>& begin,
                                           const std::vector<std::int64_t>& count) const {
  std::vector<float> values = file_->read(name, shape, begin, count);
  if (shared_rows(name) == 0 || shared_rows(name) <= begin[1]) return values;
  std::vector<std::int64_t> first = begin, rows = count;
  first[0] = 0, rows[0] = 1, rows[1] = std::min(count[1], shared_rows(name) - begin[1]);
  const std::vector<float> shared = file_->read(name, shape, first, rows);
  const std::ptrdiff_t sequence = std::ssize(values) / count[0];
  for (std::int64_t b = 0; b < count[0]; ++b) std::ranges::copy(shared, values.begin() + b * sequence);
  return values;
}

std::vector<float> TensorSource::slab(const std::string& name, const std::vector<std::int64_t>& shape, float scale,
                                      const std::vector<std::int64_t>& begin,
                                      const std::vector<std::int64_t>& count) const {
  if (file_) return read_file(name, shape, begin, count);
  // Coordinates (plane, row, column) = (0, 0, i), (0, i, j), (i, j, the rest flattened).
  const std::size_t rank = shape.size();
  const std::size_t leading = rank < 3 ? rank - 1 : 2;
  const std::uint64_t key = this->key(name), repeat = this->repeat(name);
  std::vector<float> values(static_cast<std::size_t>(elements_of(count)));
  std::vector<std::int64_t> at(rank, 0);
  for (float& value : values) {
    std::int64_t column = 0;
    for (std::size_t i = leading; i < rank; ++i) column = column * shape[i] + begin[i] + at[i];
    const std::int64_t row = leading > 0 ? begin[leading - 1] + at[leading - 1] : 0;
    const std::int64_t plane = leading > 1 && row >= shared_rows(name) ? begin[0] + at[0] : 0;
    value = scale * synthetic_value(key, static_cast<std::uint32_t>(plane),
                                    source_row(key, static_cast<std::uint64_t>(row), repeat),
                                    static_cast<std::uint32_t>(column));
    for (std::size_t i = rank; i-- > 0 && ++at[i] == count[i];) at[i] = 0;
  }
  return values;
}

std::vector<WeightSpec> weight_specs(const Config& config, std::int64_t layer) {
  const ModelConfig& m = config.model;
  const std::string prefix = m.layers > 1 ? "weights/layer" + std::to_string(layer) + "/" : "weights/";
  std::vector<WeightSpec> specs;
  const auto add = [&](const std::string& name, std::vector<std::int64_t> shape, std::int64_t fan_in) {
    specs.push_back({prefix + name, std::move(shape), 1.0f / std::sqrt(static_cast<float>(fan_in))});
  };
  add("w_q", {m.dim, m.n_heads * m.d_k}, m.dim);
  for (const Branch c : kv_column_order) {
    if (m.shared_kv && c != sel) continue;
    add(std::string("w_k_") + branch_names[c], {m.dim, m.n_kv_groups * m.d_k}, m.dim);
    add(std::string("w_v_") + branch_names[c], {m.dim, m.n_kv_groups * m.d_v}, m.dim);
  }
  add("w_o", {m.n_heads * m.d_v, m.dim}, m.n_heads * m.d_v);
  add("gate_w1", {m.d_k, m.d_k / 2}, m.d_k);
  add("gate_b1", {m.d_k / 2}, m.d_k);
  add("gate_w2", {m.d_k / 2, 3}, m.d_k / 2);
  add("gate_b2", {3}, m.d_k / 2);
  if (config.phi == PhiKind::mlp)
    for (const bool value : {false, true}) {
      const std::string phi = value ? "phi_v_" : "phi_k_";
      const std::int64_t width = value ? m.d_v : m.d_k, l = config.nsa.l;
      const std::int64_t hidden = config.phi_hidden > 0 ? config.phi_hidden : 2 * m.d_k;
      add(phi + "pos", {l, width}, width);
      add(phi + "w1", {l * width, hidden}, l * width);
      add(phi + "w2", {hidden, width}, hidden);
    }
  return specs;
}

Weights::Weights(const DeviceOps& device, Stream* stream, MemoryAccount& account, const Config& config,
                 const Partition& p, std::int64_t layer, const TensorSource* source) {
  const ModelConfig& m = config.model;
  const LayerShape& s = p.shape;
  const std::vector<WeightSpec> specs = weight_specs(config, layer);
  const auto spec = [&](const std::string& name) -> const WeightSpec& {
    for (const WeightSpec& w : specs)
      if (w.name.ends_with("/" + name)) return w;
    throw InternalError("no weight is called " + name);
  };
  const auto slab = [&](const std::string& name, std::vector<std::int64_t> begin, std::vector<std::int64_t> count) {
    const WeightSpec& w = spec(name);
    return source ? source->slab(w.name, w.shape, w.scale, begin, count) : std::vector<float>();
  };
  const auto store = [&](const std::vector<float>& values, std::int64_t count, DType type) {
    buffers_.emplace_back(device, account, MemoryKind::weights, static_cast<std::size_t>(count) * size_of(type));
    if (source) {
      const std::vector<std::byte> stored = to_storage(values, type);
      device.copy(buffers_.back().data(), stored.data(), stored.size(), stream);
      device.synchronize(stream);
    }
    return buffers_.back().data();
  };
  const auto whole = [&](const std::string& name, DType type) {
    const std::vector<std::int64_t>& shape = spec(name).shape;
    return store(slab(name, std::vector<std::int64_t>(shape.size(), 0), shape), elements_of(shape), type);
  };

  // The local columns of q and of every K and V, side by side: one matrix product projects a row.
  const std::int64_t columns = qkv_columns(s);
  std::vector<float> w_qkv(source ? static_cast<std::size_t>(m.dim * columns) : 0);
  std::int64_t at = 0;
  const auto append_columns = [&](const std::string& name, std::int64_t begin, std::int64_t count) {
    const std::vector<float> matrix = slab(name, {0, begin}, {m.dim, count});
    for (std::int64_t row = 0; source && row < m.dim; ++row)
      std::memcpy(&w_qkv[row * columns + at], &matrix[row * count], static_cast<std::size_t>(count) * 4);
    at += count;
  };
  append_columns("w_q", std::int64_t{p.group_begin} * s.heads_per_group * s.d_k, std::int64_t{s.heads()} * s.d_k);
  for (const Branch c : kv_column_order) {
    if (s.shared_kv && c != sel) continue;
    append_columns(std::string("w_k_") + branch_names[c], std::int64_t{p.group_begin} * s.d_k,
                   std::int64_t{s.groups} * s.d_k);
    append_columns(std::string("w_v_") + branch_names[c], std::int64_t{p.group_begin} * s.d_v,
                   std::int64_t{s.groups} * s.d_v);
  }
  layer_.w_qkv = store(w_qkv, m.dim * columns, s.dtype);
  const std::int64_t o_rows = std::int64_t{s.heads()} * s.d_v;
  layer_.w_o = store(slab("w_o", {std::int64_t{p.head_shard} * o_rows, 0}, {o_rows, m.dim}), o_rows * m.dim, s.dtype);
  const auto floats = [&](const std::string& name) { return static_cast<const float*>(whole(name, DType::f32)); };
  layer_.gate_w1 = floats("gate_w1");
  layer_.gate_b1 = floats("gate_b1");
  layer_.gate_w2 = floats("gate_w2");
  layer_.gate_b2 = floats("gate_b2");
  if (config.phi != PhiKind::mlp) return;
  layer_.phi_k = {whole("phi_k_pos", s.dtype), whole("phi_k_w1", s.dtype), whole("phi_k_w2", s.dtype)};
  layer_.phi_v = {whole("phi_v_pos", s.dtype), whole("phi_v_w1", s.dtype), whole("phi_v_w2", s.dtype)};
}

}  // namespace nsa
