// Decode attention as stages: one split-KV launch a branch, and a launch that merges the splits where work items are
// split or long.

#include <algorithm>
#include <iterator>

#include "kernels/cuda/attention/kv_tiles.cuh"
#include "kernels/cuda/attention/stages.cuh"
#include "kernels/cuda/decode/split_kv/merge_splits.cuh"
#include "kernels/cuda/decode/split_kv/stages.cuh"

namespace nsa::gpu {

namespace {

constexpr struct { int d_k, d_v; } sizes_16[] = {{64, 64}, {128, 128}, {192, 128}}, sizes_32[] = {{64, 64}, {128, 128}};

bool is_built_for(const LayerShape& s) {
  const auto fits = [&](const auto& size) { return size.d_k == s.d_k && size.d_v == s.d_v; };
  return s.dtype == DType::f32 ? std::any_of(std::begin(sizes_32), std::end(sizes_32), fits)
                               : std::any_of(std::begin(sizes_16), std::end(sizes_16), fits);
}

}  // namespace

bool decode_accepts(const LayerShape& s, const QueryTile& tile) { return tile.tokens == 1 && is_built_for(s); }

std::int64_t tile_lse_floats(const LayerShape& s, const QueryTile& tile) {
  const std::int64_t segments = compressed_tokens(s.rules, tile.max_positions - 1) / s.lse.segment + 2;
  return tile.rows() * s.groups * decode_head_tiles(s) * segments * tiles_per_span(cmp, s) * decode_heads(s.dtype) * 2;
}

int decode_splits(std::int64_t work_items, std::int64_t tiles) {
  if (work_items > max_split_rows) return 1;
  const std::int64_t wanted = std::max<std::int64_t>(1, 2 * limits().sms / work_items);
  return static_cast<int>(std::min(wanted, (tiles + decode_warps - 1) / decode_warps));
}

void launch_decode(const DecodeParams& p, Stream* stream) {
  if (p.shape.dtype == DType::bf16)
    launch_decode_bf16(p, stream);
  else if (p.shape.dtype == DType::f16)
    launch_decode_f16(p, stream);
  else
    launch_decode_f32(p, stream);
}

// All work items together have at most two partials an SM, or one each.
std::size_t decode_scratch(const LayerShape& s, const QueryTile& tile) {
  if (!decode_accepts(s, tile)) return 0;
  const std::int64_t work_items = tile.rows() * s.groups * decode_head_tiles(s);
  const std::int64_t partials = std::max<std::int64_t>(2 * limits().sms, work_items);
  return static_cast<std::size_t>(partials * decode_partial_floats(decode_heads(s.dtype), s.d_v) +
                                  tile_lse_floats(s, tile)) *
         sizeof(float);
}

void attend_decode(Branch branch, const AttendArgs& a, Stream* stream) {
  if (a.tile.rows() == 0) return;
  if (!reads_kv_map(branch, a.shape, a.k.map)) return attend_general(branch, a, stream);
  const std::int64_t work_items = a.tile.rows() * a.shape.groups * decode_head_tiles(a.shape);
  DecodeParams p{};
  p.shape = a.shape;
  p.tile = a.tile;
  p.q = a.q;
  p.head_tiles = decode_head_tiles(a.shape);
  p.arrivals = arrival_counters(branch);
  p.selected = a.selected;
  p.out = a.out;
  p.tile_lse = static_cast<float2*>(a.scratch);
  const std::int64_t tiles = max_kv_tiles(branch, a.shape, a.k.map, a.tile.max_positions);
  const int splits = decode_splits(work_items, tiles);
  const bool separate_merge = merges_separately(branch, splits, tiles);
  p.epilogue = separate_merge ? DecodeEpilogue::store_partials : DecodeEpilogue::merge_all;
  p.jobs[0] = {branch,
               splits,
               0,
               a.k,
               a.v,
               a.reads,
               static_cast<float*>(a.scratch) + (branch == cmp ? tile_lse_floats(a.shape, a.tile) : 0)};
  p.job_count = 1;
  if (branch == cmp) {
    p.scores = static_cast<float*>(a.scores);
    p.pitch = score_pitch(a.k.map, compressed_tokens(a.shape.rules, a.tile.max_positions - 1));
    p.keeps_scores = keeps_scores(p.tile.rows() * p.shape.heads() * p.pitch);
    p.scores_only = a.scores_only;
    p.max_tiles = tiles;
    p.lse = a.lse;
  }
  launch_decode(p, stream);
  if (!separate_merge) return;
  MergeParams merge{p};
  if (!p.scores_only) merge.out[0] = a.out;
  merge.buckets = branch == cmp;
  launch_merge_splits(merge, stream);
}

}  // namespace nsa::gpu
