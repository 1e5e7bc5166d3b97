#include "kernels/cuda/sizes/planned_kernels.hpp"

#include "kernels/cuda/sizes/accepts.hpp"
#include "kernels/cuda/sizes/exchange_memory.hpp"
#include "kernels/cuda/sizes/scratch.hpp"

namespace nsa::gpu {

namespace {

bool accepts_any(const LayerShape&, const QueryTile&) { return true; }

// flash: dense tiles of many queries over the window of a prefill. The compressed tokens are part of `fused`, where
// rank recomputes the scores.
bool flash_accepts(const LayerShape& s, const QueryTile& tile) { return !tile.is_step() && tiles_shape(s); }

// A kernels input may name two of the variants of `fused` for sel; no route does.
bool tiled_sel_accepts(const LayerShape& s, const QueryTile& tile) {
  return !tile.is_step() && selected_tiles_shape(s);
}

Fp8Support fp8_support(const LayerShape& s, int ranks) {
  return ranks == 1 && fp8_step_accepts(s) ? Fp8Support::fused_step : Fp8Support::none;
}

constexpr AttendKernel any(const char* name) { return {.name = name, .accepts = accepts_any, .run = nullptr}; }
constexpr AttendKernel only(const char* name, bool (*accepts)(const LayerShape&, const QueryTile&)) {
  return {.name = name, .accepts = accepts, .run = nullptr};
}
constexpr AttendKernel fused_cmp = {
    .name = "fused", .accepts = accepts_any, .run = nullptr, .recompute_scores = tiles_shape};
constexpr AttendKernel sdpa_sel = {
    .name = "sdpa", .accepts = accepts_any, .run = nullptr, .scratch = scratch_with_packed};
constexpr AttendKernel masked = {
    .name = "masked", .accepts = masked_accepts, .run = nullptr, .scratch = scratch_with_masked};

constexpr AttendKernel cmp_kernels[] = {fused_cmp, any("sdpa"), any("sdpa_gemm"), any("scalar")};
constexpr AttendKernel sel_kernels[] = {any("fused"),
                                        sdpa_sel,
                                        any("sdpa_gemm"),
                                        masked,
                                        any("scalar"),
                                        only("tiled", tiled_sel_accepts),
                                        only("rows", rows_accept)};
constexpr AttendKernel win_kernels[] = {any("fused"), any("sdpa"),   any("sdpa_gemm"),
                                        masked,       any("scalar"), only("flash", flash_accepts)};

KernelTable make_planned_kernels() {
  KernelTable table{};
  for (const Branch b : {cmp, sel, win}) table.attend[b] = planned_attend_kernels(b);
  table.score_bytes = score_bytes;
  table.scratch_bytes = scratch_bytes;
  table.fp8_support = fp8_support;
  // The partials of 9504 rows of 64 heads are 0.9 GB. With 4 groups, 132 SMs and 8, 16 and 12 rows a work item (cmp
  // and win, rank, sel) every SM has exactly 36, 18 and 24 work items.
  table.max_tile_tokens = 9504;
  table.tile_score_budget = std::size_t{1} << 30;
  table.max_exchange_memory = peer_memory_bytes;
  return table;
}

}  // namespace

std::span<const AttendKernel> planned_attend_kernels(Branch branch) {
  if (branch == cmp) return cmp_kernels;
  return branch == sel ? std::span<const AttendKernel>(sel_kernels) : win_kernels;
}

const KernelTable& planned_kernels() {
  static const KernelTable table = make_planned_kernels();
  return table;
}

}  // namespace nsa::gpu
