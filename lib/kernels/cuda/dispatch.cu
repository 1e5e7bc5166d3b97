// Which kernel runs a branch. The route name `fused` stands for four kernels: the result file holds the variant's name.
//
// variant  for                                                                     source
// tiled    prefill tiles, 16-bit storage, capability 9.0                           prefill/dense, prefill/selected
// decode   the query rows of a decode step: tensor cores, or scalar arithmetic for fp32   decode/split_kv
// rows     query rows one by one, 16-bit storage, tensor cores                     attention/rows.cu
// scalar   every other shape                                                       attention/scalar.cu
//
// `sdpa` stands for two: packed SDPA by the best kernels there are, and matrix products where these refuse.
//
// variant        for                                                      source
// sdpa_split_kv  sel, and win of a decode step: 16-bit, tensor cores      attention/sdpa/packed.cu, decode/split_kv
// sdpa_gemm      every other shape, and cmp, whose scores rank reads      attention/sdpa/gemm.cu
// scalar         cmp of a paged cache                                     attention/scalar.cu

#include <array>
#include <string_view>

#include "kernels/cuda/attention/split_kv.cuh"
#include "kernels/cuda/attention/stages.cuh"
#include "kernels/cuda/decode/split_kv/instances.cuh"
#include "kernels/cuda/decode/split_kv/stages.cuh"
#include "kernels/cuda/dispatch.cuh"
#include "kernels/cuda/prefill/stages.cuh"
#include "kernels/cuda/sizes/planned_kernels.hpp"
#include "kernels/cuda/sizes/scratch.hpp"

namespace nsa::gpu {

namespace {

template <Branch B, void (*Run)(Branch, const AttendArgs&, Stream*)>
void attend(const AttendArgs& a, Stream* stream) {
  Run(B, with_branch_scratch(a, B), stream);
}

template <Branch B>
void attend_tiled(const AttendArgs& a, Stream* stream) {
  if constexpr (B == sel)
    attend_prefill_sel(a, stream);
  else
    attend_prefill(B, a, stream);
}

struct Variant {
  const char* name;
  void (*run)(const AttendArgs&, Stream*);
};

template <Branch B>
Variant fused_variant(const AttendArgs& a) {
  const LayerShape& s = a.shape;
  const RowMap& map = a.k.map;
  constexpr Variant tiled = {"tiled", attend_tiled<B>};
  const bool dense = a.policy.recompute_scores || (B == win && !a.tile.is_step()), paged = a.k.pages.pages;
  if (B != sel && dense && prefill_accepts(B, s, map)) return tiled;
  if (B == sel && !a.tile.is_step() && prefill_sel_accepts(s, map) && prefill_sel_pays(s, a.tile)) return tiled;
  if (B == cmp && a.policy.recompute_scores)
    throw InternalError("attend of cmp is to store no scores and its cache is cut into chunks");
  if (decode_accepts(s, a.tile) && reads_step_map(B, s, map)) return {"decode", attend<B, attend_decode>};
  if (!paged && rows_accept(s, a.tile) && reads_kv_map(B, s, map)) return {"rows", attend<B, attend_rows>};
  if (B == sel && !a.tile.is_step() && prefill_sel_accepts(s, map)) return tiled;
  return {"scalar", attend<B, attend_general>};
}

template <Variant (*VariantOf)(const AttendArgs&)>
void run_variant(const AttendArgs& a, Stream* stream) {
  if (is_quantised(a.k)) throw InternalError("attend: only the fused decode step reads FP8 rows");
  VariantOf(a).run(a, stream);
}

template <Variant (*VariantOf)(const AttendArgs&)>
const char* variant_name(const AttendArgs& a) {
  return VariantOf(a).name;
}

template <Branch B>
void attend_with_mask(const AttendArgs& a, Stream* stream) {
  if (a.k.pages.pages) throw LaunchError("masked does not read a paged cache");
  const std::size_t part = padded(masked_scratch(a.shape, a.tile));
  const std::size_t offset = padded(scratch_bytes(a.shape, a.tile, a.policy)) + (B == win ? part : 0);
  attend_masked(B, with_scratch(a, offset, part), stream);
}

// The arguments of packed SDPA; without scratch where there is no room, as after a fallback to sdpa.
AttendArgs with_packed_scratch(const AttendArgs& a) {
  const std::size_t offset = std::min(a.scratch_bytes, offset_of_packed(a.shape, a.tile, a.policy));
  return with_scratch(a, offset, a.scratch_bytes - offset);
}

template <Branch B>
void attend_products(const AttendArgs& a, Stream* stream) {
  if (B == cmp && a.k.pages.pages) throw LaunchError("sdpa_gemm does not read a paged cache of compressed tokens");
  attend<B, attend_gemm>(a, stream);
}

// Measured at the tuned head sizes only.
bool split_kv_pays(const LayerShape& s) { return s.dtype != DType::f32 && is_tuned_size(s); }

template <Branch B>
Variant sdpa_variant(const AttendArgs& a) {
  constexpr Variant gemm = {"sdpa_gemm", attend<B, attend_gemm>};
  if (B == cmp && a.k.pages.pages) return {"scalar", attend<B, attend_general>};  // products take rows in order
  if (B == cmp || !split_kv_pays(a.shape) || a.tile.rows() == 0) return gemm;
  if constexpr (B == sel) {
    if (packed_fits(with_packed_scratch(a)))
      return {"sdpa_split_kv",
              [](const AttendArgs& x, Stream* stream) { attend_packed(with_packed_scratch(x), stream); }};
  } else if (decode_accepts(a.shape, a.tile) && reads_step_map(B, a.shape, a.k.map)) {
    return {"sdpa_split_kv", attend<B, attend_decode>};
  }
  return gemm;
}

void attend_tiled_sel(const AttendArgs& a, Stream* stream) {
  if (!prefill_sel_accepts(a.shape, a.k.map)) throw LaunchError("tiled does not read a cache that is cut like this");
  attend_prefill_sel(a, stream);
}

void attend_flash(const AttendArgs& a, Stream* stream) {
  if (!prefill_accepts(win, a.shape, a.k.map)) throw LaunchError("flash does not read a cache that is cut like this");
  attend_prefill(win, a, stream);
}

/// What runs under a name of planned_attend_kernels().
struct Run {
  std::string_view name;
  void (*run)(const AttendArgs&, Stream*);
  const char* (*variant)(const AttendArgs&) = nullptr;
};
template <Branch B>
constexpr Run fused = {"fused", run_variant<fused_variant<B>>, variant_name<fused_variant<B>>};
template <Branch B>
constexpr Run sdpa = {"sdpa", run_variant<sdpa_variant<B>>, variant_name<sdpa_variant<B>>};
template <Branch B>
constexpr Run gemm = {"sdpa_gemm", attend_products<B>};
template <Branch B>
constexpr Run masked = {"masked", attend_with_mask<B>};
template <Branch B>
constexpr Run scalar = {"scalar", attend<B, attend_general>};

constexpr Run cmp_runs[] = {fused<cmp>, sdpa<cmp>, gemm<cmp>, scalar<cmp>};
constexpr Run sel_runs[] = {fused<sel>,
                            sdpa<sel>,
                            gemm<sel>,
                            masked<sel>,
                            scalar<sel>,
                            {"tiled", attend_tiled_sel},
                            {"rows", attend<sel, attend_rows>}};
constexpr Run win_runs[] = {fused<win>, sdpa<win>, gemm<win>, masked<win>, scalar<win>, {"flash", attend_flash}};

/// The planned kernels with what runs: the same names in the same order.
template <std::size_t N>
std::array<AttendKernel, N> with_runs(Branch branch, const Run (&runs)[N]) {
  const std::span<const AttendKernel> planned = planned_attend_kernels(branch);
  if (planned.size() != N) throw InternalError("the lists of planned kernels and of what runs differ");
  std::array<AttendKernel, N> kernels;
  for (std::size_t i = 0; i < N; ++i) {
    if (planned[i].name != runs[i].name) throw InternalError("no run of " + std::string(planned[i].name));
    kernels[i] = planned[i];
    kernels[i].run = runs[i].run;
    kernels[i].variant = runs[i].variant;
  }
  return kernels;
}

}  // namespace

std::span<const AttendKernel> attend_kernels(Branch branch) {
  static const auto cmp_kernels = with_runs(cmp, cmp_runs);
  static const auto sel_kernels = with_runs(sel, sel_runs);
  static const auto win_kernels = with_runs(win, win_runs);
  if (branch == cmp) return cmp_kernels;
  return branch == sel ? std::span<const AttendKernel>(sel_kernels) : win_kernels;
}

}  // namespace nsa::gpu
