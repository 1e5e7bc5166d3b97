// The CUDA kernel table.

#include <algorithm>

#include "kernels/cuda/attention/block_sums.cuh"
#include "kernels/cuda/attention/stages.cuh"
#include "kernels/cuda/decode/split_kv/params.cuh"
#include "kernels/cuda/decode/split_kv/stages.cuh"
#include "kernels/cuda/decode/stages.cuh"
#include "kernels/cuda/exchange/peer_exchange.hpp"
#include "kernels/cuda/layer/stages.cuh"
#include "kernels/cuda/prefill/stages.cuh"
#include "kernels/cuda/rank/stages.cuh"

namespace nsa::gpu {

namespace {

std::size_t padded(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

// The branches may run side by side on several streams, so each has a part of the scratch to itself, and rank one
// behind them. project runs before all of them and shares.
std::size_t branch_part(const LayerShape& s, const QueryTile& tile) {
  QueryTile kept = tile;
  if (tile.rescores) {  // no leaves to keep, and more rows than these are not split
    kept.tokens = std::min(tile.tokens, 16);
    kept.max_positions = 1;
  }
  return padded(
      std::max({attend_scratch(s, tile), decode_scratch(s, kept), rows_scratch(s, kept), sdpa_scratch(s, tile)}));
}

template <class Args>
Args with_part(Args a, std::size_t offset, std::size_t bytes) {
  if (offset + bytes > a.scratch_bytes)
    throw InternalError("scratch of " + std::to_string(a.scratch_bytes) + " bytes is too small (" +
                        std::to_string(offset + bytes) + " needed)");
  a.scratch = static_cast<char*>(a.scratch) + offset;
  a.scratch_bytes = bytes;
  return a;
}

template <Branch B, void (*Run)(Branch, const AttendArgs&, Stream*)>
void attend(const AttendArgs& a, Stream* stream) {
  const std::size_t part = branch_part(a.shape, a.tile);
  Run(B, with_part(a, B * part, part), stream);
}

bool accepts_any(const LayerShape&, const QueryTile&) { return true; }

template <Branch B>
constexpr AttendKernel general = {"scalar", accepts_any, attend<B, attend_general>};

// The kernel that `fused` is for these arguments, under the name the result file has for it.
struct Variant {
  const char* name;
  void (*run)(const AttendArgs&, Stream*);
};

template <Branch B>
void attend_tiled(const AttendArgs& a, Stream* stream) {
  if constexpr (B == sel)
    attend_prefill_sel(a, stream);
  else
    attend_prefill(B, a, stream);
}

template <Branch B>
Variant best_for(const AttendArgs& a) {
  const LayerShape& s = a.shape;
  const RowMap& map = a.k.map;
  constexpr Variant tiled = {"tiled", attend_tiled<B>};
  if (B != sel && (a.tile.rescores || (B == win && a.tile.tokens > 1)) && prefill_accepts(B, s, map)) return tiled;
  if (B == sel && a.tile.tokens > 1 && prefill_sel_accepts(s, map) && prefill_sel_pays(s, a.tile)) return tiled;
  if (B == cmp && a.tile.rescores) throw InternalError("attend_cmp is to leave no scores and its cache is cut");
  if (decode_accepts(s, a.tile) && reads_kv_map(B, s, map)) return {"decode", attend<B, attend_decode>};
  if (rows_accept(s, a.tile) && reads_kv_map(B, s, map)) return {"rows", attend<B, attend_rows>};
  return {"scalar", attend<B, attend_general>};
}

template <Branch B>
void attend_best(const AttendArgs& a, Stream* stream) {
  best_for<B>(a).run(a, stream);
}
template <Branch B>
const char* best_name(const AttendArgs& a) {
  return best_for<B>(a).name;
}

template <Branch B>
constexpr AttendKernel best = {"fused", accepts_any, attend_best<B>, B == cmp ? tiles_shape : nullptr,
                               nullptr, best_name<B>};

// Two of what `fused` is for sel, by their own names: a kernels input may list them, no route does.
bool tiled_accepts(const LayerShape& s, const QueryTile& tile) {
  return tile.tokens > 1 && prefill_sel_accepts(s, RowMap{});
}
void attend_tiled_sel(const AttendArgs& a, Stream* stream) {
  if (!prefill_sel_accepts(a.shape, a.k.map)) throw LaunchError("tiled does not read a cache that is cut like this");
  attend_prefill_sel(a, stream);
}
constexpr AttendKernel tiled_sel = {"tiled", tiled_accepts, attend_tiled_sel};
constexpr AttendKernel rows_sel = {"rows", rows_accept, attend<sel, attend_rows>};

template <Branch B>
constexpr AttendKernel sdpa = {"sdpa", accepts_any, attend<B, attend_sdpa>};
// masked is asked for, never fallen back to: its scratch lies behind the other stages' where it is wanted.
template <Branch B>
void attend_behind(const AttendArgs& a, Stream* stream);
std::size_t scratch_with_masked(const LayerShape& s, const QueryTile& tile);
template <Branch B>
constexpr AttendKernel masked = {"masked", masked_accepts, attend_behind<B>, nullptr, scratch_with_masked};

// Dense tiles of many queries: the window of a prefill. The compressed ones are part of `fused`, where rank forms
// scores.
bool flash_accepts(const LayerShape& s, const QueryTile& tile) {
  return tile.tokens > 1 && prefill_accepts(win, s, RowMap{});
}
void attend_flash(const AttendArgs& a, Stream* stream) {
  if (!prefill_accepts(win, a.shape, a.k.map)) throw LaunchError("flash does not read a cache that is cut like this");
  attend_prefill(win, a, stream);
}

constexpr AttendKernel cmp_kernels[] = {best<cmp>, sdpa<cmp>, general<cmp>};
constexpr AttendKernel sel_kernels[] = {best<sel>, sdpa<sel>, masked<sel>, general<sel>, tiled_sel, rows_sel};
constexpr AttendKernel win_kernels[] = {
    best<win>, sdpa<win>, masked<win>, general<win>, {"flash", flash_accepts, attend_flash}};

void rank_with_scratch(const RankArgs& a, Stream* stream) {
  if (a.tile.rescores)
    rank_prefill(with_part(a, branches * branch_part(a.shape, a.tile), rank_prefill_scratch(a.shape, a.tile)), stream);
  else
    rank(with_part(a, branches * branch_part(a.shape, a.tile), rank_scratch(a.shape, a.tile)), stream);
}

void decode_step_with_scratch(const AttentionArgs& a, Stream* stream) {
  const LayerShape& s = a.combine.shape;
  const QueryTile& tile = a.combine.tile;
  AttentionArgs with = a;
  with.attend[cmp] = with_part(a.attend[cmp], 0, branches * branch_part(s, tile));
  with.rank = with_part(a.rank, branches * branch_part(s, tile), rank_scratch(s, tile));
  decode_step(with, stream);
}

void prefill_step_with_scratch(const AttentionArgs& a, Stream* stream) {
  const LayerShape& s = a.combine.shape;
  const QueryTile& tile = a.combine.tile;
  AttentionArgs with = a;
  with.rank = with_part(a.rank, branches * branch_part(s, tile), rank_prefill_scratch(s, tile));
  prefill_step(with, stream);
}

// open() and weigh() find the parts of a branch in that branch's part of the scratch: sel and rank have their own.
template <void (*Run)(const ShardedAttentionArgs&, Stream*)>
void with_shard_scratch(const ShardedAttentionArgs& a, Stream* stream) {
  ShardedAttentionArgs with = a;
  const std::size_t part = branch_part(a.combine.shape, a.combine.tile);
  for (const Branch b : {cmp, win}) with.attend[b] = with_part(a.attend[b], b * part, part);
  Run(with, stream);
}
constexpr ShardedAttention sharded_step = {decode_shard_accepts, with_shard_scratch<decode_open>,
                                           with_shard_scratch<decode_weigh>, decode_combine};

std::size_t score_bytes(const LayerShape& s, const QueryTile& tile, std::int64_t cmp_rows) {
  if (tile.rescores) return 0;
  // Where those are chunks with halos, there are so many at most, and each takes so much more.
  const std::int64_t before = s.rules.l / s.rules.d - 1, chunks = cmp_rows / (s.lse.segment + before) + 1,
                     more = round_up_to_sectors(s.lse.segment) + round_up_to_sectors(before) - s.lse.segment - before;
  const std::int64_t raw = tile.rows() * s.heads() * padded_columns(cmp_rows + chunks * more);
  // A decode step at once may leave sums of blocks instead, which are more where there are few heads.
  const std::int64_t sums = tile.tokens == 1 && leaves_sums(s) && decode_accepts(s, tile)
                                ? tile.rows() * s.groups * decode_head_tiles(s) *
                                      tile_sum_floats((cmp_rows + tile_rows - 1) / tile_rows, decode_heads(s.dtype))
                                : 0;
  return static_cast<std::size_t>(std::max(raw, sums)) * sizeof(float);
}

std::size_t scratch_bytes(const LayerShape& s, const QueryTile& tile) {
  const std::size_t ranking = tile.rescores ? rank_prefill_scratch(s, tile) : rank_scratch(s, tile);
  return std::max(padded(project_scratch(s, tile)), branches * branch_part(s, tile) + padded(ranking));
}

template <Branch B>
void attend_behind(const AttendArgs& a, Stream* stream) {
  const std::size_t part = padded(masked_scratch(a.shape, a.tile));
  attend_masked(B, with_part(a, padded(scratch_bytes(a.shape, a.tile)) + (B == win ? part : 0), part), stream);
}

std::size_t scratch_with_masked(const LayerShape& s, const QueryTile& tile) {
  return padded(scratch_bytes(s, tile)) + 2 * padded(masked_scratch(s, tile));
}

// Prefill: the partials of that many rows of 64 heads are 0.9 GB. With 4 groups, 132 SMs and 8, 16 and 12 rows an item
// (cmp and win, rank, sel) every SM has exactly 36, 18 and 24 items.
constexpr std::int32_t tile_tokens = 9504;
constexpr std::size_t tile_budget = std::size_t{1} << 30;

constexpr KernelTable table = {project,
                               append,
                               compress,
                               {cmp_kernels, sel_kernels, win_kernels},
                               rank_with_scratch,
                               select,
                               combine,
                               output,
                               rmsnorm,
                               add,
                               copy_rows,
                               fill_rows,
                               advance,
                               score_bytes,
                               scratch_bytes,
                               tile_tokens,
                               tile_budget,
                               checksum,
                               decode_prologue,
                               decode_step_accepts,
                               decode_step_with_scratch,
                               prefill_step_accepts,
                               prefill_step_with_scratch,
                               &sharded_step,
                               peer_memory_bytes};

}  // namespace

const KernelTable& kernel_table() { return table; }

}  // namespace nsa::gpu
