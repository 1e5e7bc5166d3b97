#pragma once
// A whole prefill on one GPU, batch 1, on synthetic inputs, for the benchmark and the test of repeated runs.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "gpu/step_args.hpp"
#include "kernels/diagnostics/error.hpp"
#include "kernels/interface/backend.hpp"
#include "kernels/shared/random.hpp"

namespace nsa::test {

struct WholePrefill {
  /// `tile_tokens` 0: the tile of lib/nsa; `by_rows`: rank reads raw scores.
  WholePrefill(const Backend& b, const LayerShape& shape, std::int64_t T, int tile_tokens, bool by_rows);
  ~WholePrefill() { backend.device->destroy_stream(stream); }
  WholePrefill(const WholePrefill&) = delete;
  WholePrefill& operator=(const WholePrefill&) = delete;
  void run(const std::vector<Event*>* events);
  void run_fused();
  /// The memory of the stages on a tile whose first position is `row`.
  StepMemory step(const QueryTile& tile, std::int64_t row) const;
  template <class Body>
  void each_tile(Body&& body) const;

  const Backend& backend;
  WorkMemory memory;
  LayerShape s;
  std::int64_t T;
  QueryTile widest;
  AttentionPolicy policy;
  KvView k[branches], v[branches];
  char *q, *o;
  float *partials, *lse, *gate;
  void *scores, *scratch;
  std::size_t scratch_bytes;
  std::int64_t *reads, *starts;
  std::int32_t* selected;
  Stream* stream;
};

inline WholePrefill::WholePrefill(const Backend& b, const LayerShape& shape, std::int64_t context, int tile_tokens,
                                  bool by_rows)
    : backend(b), memory{b, {}, {}}, s(shape), T(context) {
  memory.buffers.reserve(64);
  const std::int64_t n = compressed_tokens(s.rules, T - 1);
  const auto fill = [&](std::int64_t rows, std::int64_t planes, int width, const char* name, float scale) {
    KvView view;
    view.width = width;
    view.plane_stride = rows * width;
    view.data = memory.make((planes * rows + padding_rows) * width * 2);
    b.kernels->fill_rows({s.dtype, view, 1, static_cast<std::int32_t>(planes), 0, 0, rows, tensor_key(1, name), scale},
                         nullptr);
    return view;
  };
  const char* names[branches][2] = {{"k_cmp", "v_cmp"}, {"k_sel", "v_sel"}, {"k_win", "v_win"}};
  for (int c = 0; c < branches; ++c) {
    k[c] = fill(c == cmp ? n : T, s.groups, s.d_k, names[c][0], 1.0f);
    v[c] = fill(c == cmp ? n : T, s.groups, s.d_v, names[c][1], 1.0f);
  }
  q = static_cast<char*>(fill(T, 1, s.heads() * s.d_k, "q", 2.0f).data);
  widest.max_positions = T;
  const auto recompute = b.kernels->attend[cmp][0].recompute_scores;
  policy.recompute_scores = !by_rows && recompute && recompute(s);
  widest.tokens =
      static_cast<std::int32_t>(std::min<std::int64_t>(tile_tokens > 0 ? tile_tokens : b.kernels->max_tile_tokens, T));
  const auto score_bytes = [&] { return policy.recompute_scores ? 0 : b.kernels->score_bytes(s, widest, n); };
  while (tile_tokens == 0 && score_bytes() > b.kernels->tile_score_budget) widest.tokens /= 2;
  const std::int64_t tokens = widest.tokens;
  partials = memory.make<float>(partial_floats(s, tokens) * 4);
  lse = memory.make<float>(s.lse.buckets * tokens * s.heads() * 8);
  gate = memory.make<float>(T * s.groups * 3 * 4);
  b.device->fill(gate, 0x3E, static_cast<std::size_t>(T * s.groups * 3 * 4), nullptr);
  scores = memory.make(static_cast<std::int64_t>(score_bytes()));
  scratch_bytes = b.kernels->scratch_bytes(s, widest, policy);
  scratch = memory.make(static_cast<std::int64_t>(scratch_bytes));
  o = memory.make<char>(tokens * s.heads() * s.d_v * 2);
  reads = memory.make<std::int64_t>(branches * s.groups * 8);
  selected = memory.make<std::int32_t>(tokens * s.groups * s.rules.n_sel * 4);
  std::vector<std::int64_t> first;
  for (std::int64_t t = 0; t < T; t += tokens) first.push_back(t);
  starts = memory.make<std::int64_t>(static_cast<std::int64_t>(first.size()) * 8);
  b.device->copy(starts, first.data(), first.size() * 8, nullptr);
  b.device->synchronize(nullptr);
  stream = b.device->create_stream();
}

inline StepMemory WholePrefill::step(const QueryTile& tile, std::int64_t row) const {
  StepMemory m{.stage = {s, tile, policy, scratch, scratch_bytes}};
  m.q = q + row * s.heads() * s.d_k * 2;
  std::copy_n(k, branches, m.k);
  std::copy_n(v, branches, m.v);
  m.gate = gate + row * s.groups * 3;
  m.partials = partials, m.lse = lse;
  m.scores = scores, m.o = o;
  m.reads = reads, m.selected = selected;
  return m;
}

template <class Body>
inline void WholePrefill::each_tile(Body&& body) const {
  for (std::int64_t first = 0, i = 0; first < T; first += widest.tokens, ++i) {
    QueryTile tile = widest;
    tile.tokens = static_cast<std::int32_t>(std::min<std::int64_t>(widest.tokens, T - first));
    tile.first_position = starts + i;
    body(tile, first);
  }
}

// One prefill, stage by stage. Records one of `events` before every stage of every tile and one at the end.
inline void WholePrefill::run(const std::vector<Event*>* events) {
  std::size_t at = 0;
  const auto record_event = [&] {
    if (events) backend.device->record((*events)[at++], stream);
  };
  const auto attend = [&](Branch branch, const QueryTile& tile, std::int64_t first) {
    record_event();
    backend.kernels->attend[branch][0].run(step(tile, first).attend_args(branch), stream);
  };
  each_tile([&](const QueryTile& tile, std::int64_t first) {
    attend(cmp, tile, first);
    record_event();
    backend.kernels->rank(step(tile, first).rank_args(), stream);
    attend(sel, tile, first);
    attend(win, tile, first);
    record_event();
    backend.kernels->combine(step(tile, first).combine_args(), stream);
  });
  record_event();
}

inline void WholePrefill::run_fused() {
  each_tile([&](const QueryTile& tile, std::int64_t first) {
    test::run_fused(backend.kernels->prefill_attention, step(tile, first).attention_args(), stream);
  });
}

}  // namespace nsa::test
