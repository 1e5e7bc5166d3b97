#pragma once
// The attention of a decode step on one GPU, on synthetic inputs, for the benchmark and the test of repeated runs.

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "gpu/step_args.hpp"
#include "kernels/shared/random.hpp"

namespace nsa::test {

/// `batch` sequences of `context` positions; the step is at the last position, or at the last `tokens` ones. There are
/// several sets of q and caches: steps that rotate over enough sets find nothing of their inputs in the L2.
struct WholeDecode {
  struct Set {
    KvView k[branches], v[branches];
    void* q;
  };
  WholeDecode(const Backend& b, const LayerShape& shape, int batch, std::int64_t context, int set_count, int tokens = 1)
      : WholeDecode(b, shape, std::vector<std::int64_t>(static_cast<std::size_t>(batch), context), set_count, tokens) {}
  /// A ragged batch where the contexts differ: a sequence of each. Every one has caches for the longest.
  WholeDecode(const Backend& b, const LayerShape& shape, const std::vector<std::int64_t>& contexts, int set_count,
              int tokens = 1);
  ~WholeDecode() { backend.device->destroy_stream(stream); }
  WholeDecode(const WholeDecode&) = delete;
  WholeDecode& operator=(const WholeDecode&) = delete;
  /// K and V bytes a step must read.
  static std::int64_t bytes(const LayerShape& s, int batch, std::int64_t context);
  StepMemory step(const Set& set) const;
  /// The step of one row alone, of a sequence of `context` positions; its outputs are those of row 0.
  StepMemory step_alone(const Set& set, std::int64_t row, std::int64_t context) const;
  std::int64_t o_bytes() const { return tile.rows() * s.heads() * s.d_v * static_cast<std::int64_t>(size_of(s.dtype)); }
  std::int64_t selected_bytes() const { return tile.rows() * s.groups * s.rules.n_sel * 4; }
  void run_fused(const Set& set) const;
  void run_stage(const Set& set, const std::string& name) const;

  const Backend& backend;
  WorkMemory memory;
  LayerShape s;
  QueryTile tile;
  std::vector<Set> sets;
  float *partials, *lse, *gate;
  void *scores, *scratch, *o;
  std::size_t score_bytes, scratch_bytes;
  std::int64_t *reads, *row_positions;
  std::int32_t* selected;
  Stream* stream;

 private:
  KvView make_rows(std::int64_t planes, std::int64_t rows, int width, const std::string& name, float scale,
                   KvPrecision precision = KvPrecision::same);
};

/// Two groups of `heads` heads, Dk = Dv = d, that choose `blocks` blocks.
inline LayerShape shape_of(DType type, int d, int heads, int blocks = 16) {
  LayerShape s;
  s.rules.n_sel = blocks;
  s.groups = 2;
  s.heads_per_group = heads;
  s.d_k = s.d_v = d;
  s.dtype = type;
  return s;
}

/// Sequences whose longest ones lend KV tiles in one launch, with shape_of(DType::bf16, 128, 16); some SMs stay free.
inline std::vector<std::int64_t> many_lending() {
  std::vector<std::int64_t> contexts = {1, 60001, 64, 17, 40000};
  while (contexts.size() < 60) contexts.push_back(1 + static_cast<std::int64_t>(contexts.size() * 7919 % 9000));
  return contexts;
}

/// shape_of() with FP8 caches, or their values in storage type.
inline LayerShape fp8_shape_of(int heads, KvPrecision precision = KvPrecision::fp8_e4m3) {
  LayerShape s = shape_of(DType::bf16, 128, heads);
  s.kv_precision = s.cmp_precision = precision;
  return s;
}
inline std::int64_t element_bytes(const KvView& view, DType type) {
  return is_quantised(view) ? 1 : static_cast<std::int64_t>(size_of(type));
}

/// `count` values of device memory, once the stream is done.
template <class T>
std::vector<T> download(const WholeDecode& whole, const void* from, std::int64_t count) {
  std::vector<T> values(static_cast<std::size_t>(count));
  whole.backend.device->copy(values.data(), from, values.size() * sizeof(T), whole.stream);
  whole.backend.device->synchronize(whole.stream);
  return values;
}

inline std::int64_t WholeDecode::bytes(const LayerShape& s, int batch, std::int64_t context) {
  const std::int64_t chosen = std::min<std::int64_t>(context, std::int64_t{s.rules.n_sel} * s.rules.l_sel),
                     tokens =
                         compressed_tokens(s.rules, context - 1) + chosen + std::min<std::int64_t>(context, s.rules.w);
  return std::int64_t{batch} * s.groups * tokens *
         (row_bytes(s.dtype, s.kv_precision, s.d_k) + row_bytes(s.dtype, s.kv_precision, s.d_v));
}

inline KvView WholeDecode::make_rows(std::int64_t planes, std::int64_t rows, int width, const std::string& name,
                                     float scale, KvPrecision precision) {
  KvView v;
  v.width = width;
  v.plane_stride = rows * width;
  const bool fp8 = precision == KvPrecision::fp8_e4m3;
  const std::int64_t elements = planes * v.plane_stride, size = fp8 ? 1 : static_cast<std::int64_t>(size_of(s.dtype)),
                     scales = fp8 ? planes * scales_of_plane(rows) : 0;
  v.data = memory.make((elements + padding_rows * width) * size + scales);
  v.rounded = precision == KvPrecision::fp8_rounded;
  if (fp8) v.scales = static_cast<std::uint8_t*>(v.data) + elements;
  backend.kernels->fill_rows(
      {s.dtype, v, static_cast<std::int32_t>(planes), 1, 0, 0, rows, tensor_key(1, name.c_str()), scale}, nullptr);
  return v;
}

inline WholeDecode::WholeDecode(const Backend& b, const LayerShape& shape, const std::vector<std::int64_t>& contexts,
                                int set_count, int tokens)
    : backend(b), memory{b, {}, {}}, s(shape) {
  const auto batch = static_cast<int>(contexts.size());
  const auto [shortest, longest] = std::ranges::minmax(contexts);
  const std::int64_t context = longest, n = compressed_tokens(s.rules, context - 1),
                     planes = std::int64_t{batch} * s.groups,
                     mean = std::accumulate(contexts.begin(), contexts.end(), std::int64_t{0}) / batch;
  memory.buffers.reserve(4096);
  std::vector<std::int64_t> first, of_rows;
  for (const std::int64_t length : contexts) {
    first.push_back(length - tokens);
    for (int j = 0; j < tokens; ++j) of_rows.push_back(length - tokens + j);
  }
  auto* positions = memory.make<std::int64_t>(8 * batch);
  row_positions = memory.make<std::int64_t>(8 * batch * tokens);
  b.device->copy(positions, first.data(), 8 * first.size(), nullptr);
  b.device->copy(row_positions, of_rows.data(), 8 * of_rows.size(), nullptr);
  b.device->synchronize(nullptr);
  tile = {.batches = batch,
          .tokens = tokens,
          .first_position = positions,
          .max_positions = context,
          .position_stride = shortest < longest,
          .mean_positions = mean,
          .decodes = true};
  const std::int64_t ring = tokens == 1 ? s.rules.w : (s.rules.w + tokens - 1 + 63) / 64 * 64;
  const std::int64_t rows[branches] = {n, context, ring};
  for (int i = 0; i < set_count; ++i) {
    Set set;
    const std::string name = "set" + std::to_string(i);
    for (int c = 0; c < branches; ++c) {
      const KvPrecision precision = s.precision_of(static_cast<Branch>(c));
      set.k[c] = make_rows(planes, rows[c], s.d_k, name + "k" + branch_names[c], 1.0f, precision);
      set.v[c] = make_rows(planes, rows[c], s.d_v, name + "v" + branch_names[c], 1.0f, precision);
      if (c == win) set.k[c].map.ring = set.v[c].map.ring = rows[c];
    }
    set.q = make_rows(1, tile.rows(), s.heads() * s.d_k, name + "q", 2.0f).data;
    sets.push_back(set);
  }
  partials = memory.make<float>(partial_floats(s, tile.rows()) * 4);
  lse = memory.make<float>(std::int64_t{s.lse.buckets} * tile.rows() * s.heads() * 8);
  gate = memory.make<float>(tile.rows() * s.groups * 3 * 4);
  b.device->fill(gate, 0x3E, static_cast<std::size_t>(tile.rows() * s.groups * 3 * 4), nullptr);
  score_bytes = b.kernels->score_bytes(s, tile, n);
  scores = memory.make(static_cast<std::int64_t>(score_bytes));
  scratch_bytes = b.kernels->scratch_bytes(s, tile, {});
  scratch = memory.make(static_cast<std::int64_t>(scratch_bytes));
  o = memory.make(o_bytes());
  reads = memory.make<std::int64_t>(branches * planes * 8);
  selected = memory.make<std::int32_t>(selected_bytes());
  stream = b.device->create_stream();
  b.device->synchronize(nullptr);
}

inline StepMemory WholeDecode::step(const Set& set) const {
  StepMemory m{.stage = {s, tile, {}, scratch, scratch_bytes}};
  m.q = set.q;
  std::copy_n(set.k, branches, m.k);
  std::copy_n(set.v, branches, m.v);
  m.gate = gate;
  m.partials = partials, m.lse = lse;
  m.scores = scores, m.o = o;
  m.reads = reads, m.selected = selected;
  return m;
}

inline StepMemory WholeDecode::step_alone(const Set& set, std::int64_t row, std::int64_t context) const {
  const std::int64_t b = sequence_of_row(tile, row), size = static_cast<std::int64_t>(size_of(s.dtype));
  const auto from = [](const auto& data, std::int64_t bytes) {
    return const_cast<std::byte*>(reinterpret_cast<const std::byte*>(data)) + bytes;
  };
  StepMemory m = step(set);
  m.stage.tile = {0, 1, 1, row_positions + row, context};
  m.q = from(m.q, row * s.heads() * s.d_k * size);
  for (int c = 0; c < branches; ++c)
    for (KvView* view : {&m.k[c], &m.v[c]}) {
      view->data = from(view->data, b * s.groups * view->plane_stride * element_bytes(*view, s.dtype));
      if (is_quantised(*view)) view->scales += b * s.groups * scales_of_plane(view->plane_stride / view->width);
    }
  m.gate = gate + row * s.groups * branches;
  return m;
}

inline void WholeDecode::run_fused(const Set& set) const {
  test::run_fused(backend.kernels->decode_attention, step(set).attention_args(), stream);
}

/// One of cmp, sel, win, rank, combine.
inline void WholeDecode::run_stage(const Set& set, const std::string& name) const {
  if (name == "rank") return backend.kernels->rank(step(set).rank_args(), stream);
  if (name == "combine") return backend.kernels->combine(step(set).combine_args(), stream);
  for (const Branch b : {cmp, sel, win})
    if (name == branch_names[b]) backend.kernels->attend[b][0].run(step(set).attend_args(b), stream);
}

/// Fills the rows of every sequence that no step may read with NaN.
inline void poison(const WholeDecode& whole, const std::vector<std::int64_t>& contexts) {
  const LayerShape& s = whole.s;
  const DeviceOps& device = *whole.backend.device;
  const auto fill = [&](void* data, std::int64_t from, std::int64_t to) {
    device.fill(static_cast<std::byte*>(data) + from, 0xFF, static_cast<std::size_t>(to - from), nullptr);
  };
  for (const WholeDecode::Set& set : whole.sets)
    for (std::int64_t plane = 0; plane < std::ssize(contexts) * s.groups; ++plane)
      for (const Branch c : {cmp, sel}) {
        const std::int64_t context = contexts[static_cast<std::size_t>(plane / s.groups)],
                           from = c == sel ? context : compressed_tokens(s.rules, context - 1);
        const KvView& k = set.k[c];
        const std::int64_t row_bytes = k.width * element_bytes(k, s.dtype), rows = k.plane_stride / k.width,
                           scales = scales_of_plane(rows);
        fill(k.data, (plane * rows + from) * row_bytes, (plane + 1) * rows * row_bytes);
        if (!is_quantised(k)) continue;
        fill(k.scales, plane * scales + from, (plane + 1) * scales);
        // Scales of V there, NaN and the largest ones, change no o.
        device.fill(set.v[c].scales + plane * scales + from, plane % 2 == 0 ? 0xFF : 0xFE,
                    static_cast<std::size_t>(scales - from), nullptr);
      }
  device.synchronize(nullptr);
}

}  // namespace nsa::test
