// The host backend's kernel table and the sizes of its scratch.

#include <algorithm>

#include "kernels/host/attention/score_layout.hpp"
#include "kernels/host/attention/split_attention.hpp"
#include "kernels/host/runtime/host.hpp"
#include "kernels/host/runtime/stages.hpp"

namespace nsa {
namespace {

bool any_shape(const LayerShape&, const QueryTile&) { return true; }

std::size_t masked_scratch(const LayerShape& s, const QueryTile& tile, const AttentionPolicy&) {
  return host::masked_scratch(s, tile);
}

// On the host one KV mainloop with online softmax is both `fused` and, for cmp and win, `flash`; products with softmax
// between them are both `sdpa` and `sdpa_gemm`.
constexpr AttendKernel cmp_kernels[] = {{"fused", any_shape, host::attend_cmp},
                                        {"sdpa", any_shape, host::attend_cmp_sdpa},
                                        {"sdpa_gemm", any_shape, host::attend_cmp_sdpa},
                                        {"flash", any_shape, host::attend_cmp}};
constexpr AttendKernel sel_kernels[] = {
    {"fused", any_shape, host::attend_sel_direct},
    {"sdpa", any_shape, host::attend_sel_sdpa},
    {"sdpa_gemm", any_shape, host::attend_sel_sdpa},
    {.name = "masked", .accepts = host::masked_accepts, .run = host::attend_sel_masked, .scratch = masked_scratch}};
constexpr AttendKernel win_kernels[] = {
    {"fused", any_shape, host::attend_win},
    {"sdpa", any_shape, host::attend_win_sdpa},
    {"sdpa_gemm", any_shape, host::attend_win_sdpa},
    {.name = "masked", .accepts = host::masked_accepts, .run = host::attend_win_masked, .scratch = masked_scratch},
    {"flash", any_shape, host::attend_win}};

std::size_t score_bytes(const LayerShape& s, const QueryTile& tile, std::int64_t cmp_rows) {
  return static_cast<std::size_t>(host::round_up(std::max<std::int64_t>(cmp_rows, 1), host::score_block)) *
         tile.rows() * s.heads() * sizeof(float);
}

std::size_t scratch_of_tile(const LayerShape& s, const QueryTile& tile) {
  const int rows = host::item_rows(s, tile);
  return std::max({host::project_scratch(s, tile), host::output_scratch(s, tile), host::compress_scratch(s, tile),
                   host::rank_scratch(s, tile), host::attend_scratch(s, tile, rows, host::cmp_splits(s, tile)),
                   host::attend_scratch(s, tile, 1, s.rules.n_sel), host::attend_shared_scratch(s, tile),
                   host::attend_scratch(s, tile, rows, host::win_splits(s, tile)), host::sdpa_scratch(s, tile)});
}

// A prefill's last tile is narrower. With fewer rows a stage may run its splits on several threads and need more
// scratch.
std::size_t scratch_bytes(const LayerShape& s, const QueryTile& tile, const AttentionPolicy&) {
  std::size_t max_bytes = 0;
  for (QueryTile narrower = tile; narrower.tokens > 0; --narrower.tokens)
    max_bytes = std::max(max_bytes, scratch_of_tile(s, narrower));
  return max_bytes;
}

}  // namespace

const KernelTable& host_kernels() {
  static const KernelTable table = {
      .project = host::project,
      .append = host::append,
      .compress = host::compress,
      .attend = {cmp_kernels, sel_kernels, win_kernels},
      .rank = host::rank,
      .select = host::select,
      .combine = host::combine,
      .output = host::output,
      .rmsnorm = host::rmsnorm,
      .add = host::add,
      .copy_rows = host::copy_rows,
      .fill_rows = host::fill_rows,
      .checksum = host::checksum,
      .advance = host::advance,
      .fp8_support = [](const LayerShape&, int) { return Fp8Support::every_kernel; },
      .score_bytes = score_bytes,
      .scratch_bytes = scratch_bytes,
      .max_tile_tokens = 256,
      .tile_score_budget = std::size_t{64} << 20,
  };
  return table;
}

}  // namespace nsa
