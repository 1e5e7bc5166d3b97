#include "nsa/model/buffers.hpp"

#include <algorithm>

#include "nsa/model/pages.hpp"

namespace nsa {

const DeviceOps& dry_device() {
  static const DeviceOps ops = [] {
    DeviceOps dry{};
    dry.allocate = [](std::size_t) -> void* { return nullptr; };
    dry.release = [](void*) noexcept {};
    dry.create_stream = []() -> Stream* { return nullptr; };
    dry.destroy_stream = [](Stream*) noexcept {};
    dry.synchronize = [](Stream*) {};
    dry.copy = [](void*, const void*, std::size_t, Stream*) {};
    dry.fill = [](void*, int, std::size_t, Stream*) {};
    dry.create_event = []() -> Event* { return nullptr; };
    dry.destroy_event = [](Event*) noexcept {};
    return dry;
  }();
  return ops;
}

namespace {

std::int64_t element_bytes(const KvView& view, DType type) {
  return is_quantised(view) ? 1 : static_cast<std::int64_t>(size_of(type));
}

}  // namespace

std::size_t bytes_of_rank(const KvView& view, DType type) {
  return static_cast<std::size_t>(view.rank_stride * element_bytes(view, type));
}

KvView moved_by(KvView view, std::int64_t elements, std::int64_t scales, DType type) {
  view.data = static_cast<std::byte*>(view.data) + elements * element_bytes(view, type);
  if (is_quantised(view)) view.scales += scales;
  return view;
}

KvPair make_kv(const Allocator& allocate, MemoryKind kind, const LayerShape& shape, KvPrecision precision,
               std::int64_t planes, const RowMap& map, std::int64_t rows, std::int64_t ranks) {
  constexpr std::int64_t alignment = 256;  // bytes, of a rank's part of a quantised buffer
  const bool quantised = precision == KvPrecision::fp8_e4m3;
  const std::int64_t size = quantised ? 1 : static_cast<std::int64_t>(size_of(shape.dtype));
  const auto make = [&](std::int32_t width, Buffer& memory) {
    KvView view;
    view.map = map;
    view.width = width;
    view.plane_stride = rows * width;
    view.rounded = precision == KvPrecision::fp8_rounded;
    view.rank_stride = planes * view.plane_stride;
    if (quantised)
      view.rank_stride = (view.rank_stride + planes * scales_of_plane(rows) + alignment - 1) / alignment * alignment;
    memory = allocate(kind, (ranks * view.rank_stride + padding_rows * width) * size);
    view.data = memory.data();
    if (quantised) view.scales = static_cast<std::uint8_t*>(view.data) + planes * view.plane_stride;
    return view;
  };
  KvPair pair;
  pair.k = make(shape.d_k, pair.k_memory);
  pair.v = make(shape.d_v, pair.v_memory);
  return pair;
}

KvPair make_paged_kv(const Allocator& allocate, MemoryKind kind, const LayerShape& shape, KvPrecision precision,
                     const RowMap& map, const PageTable& pages, std::int64_t count) {
  const std::int64_t page_rows = std::int64_t{pages.rows} * pages.groups;
  KvPair pair = make_kv(allocate, kind, shape, precision, 1, map, count * page_rows);
  for (KvView* view : {&pair.k, &pair.v}) {
    view->pages = pages;
    view->plane_stride = std::int64_t{pages.per_sequence} * pages.rows * view->width;
  }
  return pair;
}

LayerCaches::LayerCaches(const Allocator& allocate, const Partition& p, std::int64_t batch, std::int64_t positions,
                         const CachePages* pages) {
  const std::int64_t planes = batch * p.shape.groups;
  const auto cleared = [&](KvPair pair) {
    allocate.device.fill(pair.v_memory.data(), 0, pair.v_memory.bytes(), nullptr);  // see AttendArgs::v
    allocate.device.synchronize(nullptr);
    return pair;
  };
  const auto make = [&](const RowMap& map, std::int64_t rows, KvPrecision precision) {
    return cleared(make_kv(allocate, MemoryKind::caches, p.shape, precision, planes, map, p.capacity(map, rows)));
  };
  const auto make_paged = [&](const RowMap& map, const PageTable& table, const PageLayout& layout,
                              KvPrecision precision) {
    return cleared(make_paged_kv(allocate, MemoryKind::caches, p.shape, precision, map, table, layout.count));
  };
  if (pages) {
    sel = make_paged(p.tokens(false), pages->sel_table(), pages->sel, p.shape.kv_precision);
    cmp = make_paged(p.compressed(false), pages->cmp_table(), pages->cmp, p.shape.cmp_precision);
  } else {
    sel = make(p.tokens(false), positions, p.shape.kv_precision);
    cmp = make(p.compressed(false), compressed_tokens(p.shape.rules, positions - 1), p.shape.cmp_precision);
  }
  win = make(p.window_ring(), positions, p.shape.kv_precision);
  raw = make(p.raw_ring(), positions, KvPrecision::same);
}

StepBuffers::StepBuffers(const Allocator& allocate, const KernelTable& kernels, const Config& config,
                         const Partition& p, const Point& point, std::int64_t rows, const QueryTile& tile,
                         bool exchange, bool record, const AttentionPolicy& policy, std::size_t scratch_bytes) {
  const LayerShape& s = p.shape;
  const std::int64_t storage = static_cast<std::int64_t>(size_of(s.dtype)), t = tile.rows();
  const std::int64_t heads = s.heads(), ranks = exchange ? p.kv : 1;
  const std::int64_t total = total_positions(config, point);
  const RowMap cmp_map = p.compressed(!exchange);
  const std::int64_t cmp_rows =
      exchange ? p.capacity(cmp_map, compressed_tokens(s.rules, total - 1)) : compressed_tokens(s.rules, total - 1);
  const auto make = [&](std::int64_t bytes) { return allocate(MemoryKind::activations, bytes); };

  q = make(rows * heads * s.d_k * storage);
  gate = make(rows * s.groups * 3 * 4);
  for (const Branch c : kv_column_order) {
    if (s.shared_kv && c != sel) continue;
    k[c] = make(t * s.groups * s.d_k * storage);
    v[c] = make(t * s.groups * s.d_v * storage);
  }
  scores = allocate(MemoryKind::workspace,
                    policy.recompute_scores ? 0 : static_cast<std::int64_t>(kernels.score_bytes(s, tile, cmp_rows)));
  scratch = allocate(MemoryKind::workspace, static_cast<std::int64_t>(scratch_bytes));
  const std::int64_t lse_bytes =
      policy.recompute_scores ? 0 : lse_slots(s, static_cast<std::int32_t>(ranks)) * t * heads * 2 * 4;
  const std::int64_t candidate_bytes = t * s.groups * s.rules.n_sel * static_cast<std::int64_t>(sizeof(Candidate));
  const std::int64_t partial_bytes = partial_floats(s, t) * 4;
  lse = make(lse_bytes);
  partials = make(partial_bytes);
  if (ranks > 1) {
    candidates = make(candidate_bytes);
    lse_all = make(ranks * lse_bytes);
    candidates_all = make(ranks * candidate_bytes);
    partials_all = make(ranks * partial_bytes);
  }
  selected = make(config.model.layers * t * s.groups * s.rules.n_sel * 4);
  o = make(t * heads * s.d_v * storage);
  if (record) {
    for (Buffer& branch : o_branch) branch = make(t * heads * s.d_v * 4);
    p_slc_blocks = eligible_blocks(s.rules, total - 1);
    p_slc = make(t * s.groups * p_slc_blocks * 4);
  }
  if (config.run.scope == Scope::layer) {
    x_in = make(rows * s.dim * storage);
    y = make(rows * s.dim * 4);
    if (config.model.layers > 1) x = make(rows * s.dim * 4);
  }
  reads = make(branches * point.batch * s.groups * 8);
}

}  // namespace nsa
