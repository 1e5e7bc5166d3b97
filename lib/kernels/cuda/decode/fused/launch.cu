// Which decode steps go into one kernel, and how a list is divided over CTAs and warps.

#include <algorithm>

#include "kernels/cuda/attention/kv_tiles.cuh"
#include "kernels/cuda/decode/fused/params.cuh"

namespace nsa::gpu {

namespace {

bool is_built_for(const LayerShape& s) {
  if (s.dtype == DType::f32) return s.d_k == 64 && s.d_v == 64;
  return (s.d_k == 64 && s.d_v == 64) || ((s.d_k == 128 || s.d_k == 192) && s.d_v == 128);
}

int step_clusters(const LayerShape& s, int cluster) {
  return s.dtype == DType::bf16  ? step_clusters_bf16(s, cluster)
         : s.dtype == DType::f16 ? step_clusters_f16(s, cluster)
                                 : step_clusters_f32(s, cluster);
}

// How many CTAs of how many warps share a list; cluster = 0: none will do.
struct Division {
  int cluster = 0, warps = step_warps;
};
// The one that takes least time where a wave of clusters takes its latencies and its bytes, streamed at an even share
// of the bandwidth; no more warps than tiles.
Division division_of(const LayerShape& s, const QueryTile& tile, std::int64_t most_tiles) {
  constexpr double latencies = 8e-6, bandwidth = 4.3e12;  // s, bytes/s: of an H200, and only their ratio matters
  const BlockRules& r = s.rules;
  const std::int64_t lists = tile.rows() * s.groups, T = tile.max_positions;
  const std::int64_t tokens = compressed_tokens(r, T - 1) + std::min<std::int64_t>(T, std::int64_t{r.n_sel} * r.l_sel) +
                              std::min<std::int64_t>(T, r.w);
  const double alone = static_cast<double>(tokens * (s.d_k + s.d_v)) * static_cast<double>(size_of(s.dtype)) *
                       limits().sms / bandwidth;  // a list by one SM
  Division best;
  double least = 0;
  const auto consider = [&](int cluster, int warps, std::int64_t at_once, double share) {
    const double time = static_cast<double>((lists + at_once - 1) / at_once) * (latencies + alone * share);
    if (best.cluster == 0 || time < least) best = {cluster, warps}, least = time;
  };
  for (const int cluster : {1, 2, 3, 4, 5, 6, 7, 8, 16}) {
    if (cluster > 1 && (cluster - 1) * step_warps >= most_tiles) break;
    const int at_once = step_clusters(s, cluster);
    if (at_once == 0) break;
    consider(cluster, step_warps, at_once, 1.0 / cluster);
    if (cluster == 1) consider(1, step_warps_of_many, 2 * at_once, lists > at_once ? 2.0 : 1.0);
  }
  return best;
}

// Blocks a warp scores at a time: so many that a piece begins at a multiple of 4 tokens.
int piece_of(const BlockRules& r) {
  const int piece = std::min(32, scored_tokens * r.d / r.l_sel);
  return piece > 4 ? piece - piece % 4 : piece;
}

// The same where each has one such piece at most, two tokens a lane; 0: they would not begin at multiples of 2 tokens.
int few_of(const BlockRules& r) {
  const int few = std::min(most_chosen, scored_tokens / 2 * r.d / r.l_sel);
  return few * (r.l_sel / r.d) % 2 == 0 ? few : 0;
}

bool accepts(const AttentionArgs& a) {
  const LayerShape& s = a.combine.shape;
  const BlockRules& r = s.rules;
  const int tokens = piece_of(r) * (r.l_sel / r.d);  // of a piece
  return limits().capability >= 90 && is_built_for(s) && s.heads_per_group <= decode_heads(s.dtype) &&
         r.n_sel <= most_chosen && tokens > 0 && tokens % 4 == 0 && (r.l - 1) / r.d <= std::min(most_lead, tokens) &&
         !a.rank.candidates && a.rank.selected;
}

// Where the walk leaves what blocks are scored by. What of it the L2 can hold until then is not to be driven out by K
// and V.
void place_scores(StepParams& p, float* memory) {
  const std::int64_t rows = p.tile.rows();
  p.scores = memory;
  p.pitch = score_pitch(p.k[cmp].map, p.most_tokens);
  std::int64_t floats = rows * p.shape.heads() * p.pitch;
  if (leaves_sums(p.shape)) {
    p.sums = tile_sums(memory, (p.most_tokens + tile_rows - 1) / tile_rows, decode_heads(p.shape.dtype));
    floats = rows * p.shape.groups * p.sums.tiles * p.sums.heads * (tile_blocks + 1);
  }
  p.keeps_scores = keeps_scores(floats);
}

// What the kernel reads and writes.
StepParams memory_of(const AttentionArgs& a) {
  StepParams p{};
  p.shape = a.combine.shape;
  p.tile = a.combine.tile;
  p.q = a.attend[cmp].q;
  for (int b = 0; b < branches; ++b) {
    p.k[b] = a.attend[b].k;
    p.v[b] = a.attend[b].v;
    p.reads[b] = a.attend[b].reads;
    p.leave_out[b] = a.combine.leave_out[b];
    p.o_branch[b] = a.combine.o_branch[b];
  }
  p.most_tokens = static_cast<int>(compressed_tokens(p.shape.rules, p.tile.max_positions - 1));
  place_scores(p, static_cast<float*>(a.attend[cmp].scores));
  p.scores_only = a.attend[cmp].scores_only;
  p.leaves = static_cast<float2*>(a.attend[cmp].scratch);
  p.most_tiles = decode_tiles(cmp, p.shape, p.k[cmp].map, p.tile.max_positions);
  p.selected = a.rank.selected;
  p.p_slc = a.rank.p_slc;
  p.p_slc_blocks = a.rank.p_slc_blocks;
  p.gate = a.combine.gate;
  p.o = a.combine.o;
  return p;
}

// How the work is divided; cluster = 0: not at all.
void divide(StepParams& p) {
  const LayerShape& s = p.shape;
  const BlockRules& r = s.rules;
  const int of_win = p.leave_out[win] ? 0 : (r.w + tile_rows - 1) / tile_rows,
            of_sel = p.leave_out[sel] ? 0 : r.n_sel * tiles_per_unit(sel, s), second = of_win + of_sel;
  const Division division = division_of(s, p.tile, std::max<std::int64_t>(p.most_tiles, second));
  p.cluster = division.cluster, p.warps = division.warps;
  if (p.cluster == 0) return;
  const int quads = s.d_v / 4, warps = p.cluster * p.warps;
  p.share = (decode_heads(s.dtype) * quads + p.cluster - 1) / p.cluster;
  p.share_heads = p.share % quads == 0 ? p.share / quads : quads % p.share == 0 ? 1 : p.share / quads + 2;
  p.piece = piece_of(r);
  p.by_cluster = Divisor(p.cluster), p.by_share = Divisor(p.share);
  p.by_piece = Divisor(p.piece);
  p.groups = Divisor(s.groups), p.stride = Divisor(r.d), p.block = Divisor(r.l_sel), p.leaf = Divisor(s.lse.segment);
  if (of_win > 0) {
    // By tiles, and a window that begins anywhere has two more. Where warps have several tiles of cmp the window's gain
    // the time of the choice, so half as many will do. Every CTA keeps a warp that scores.
    const int weight = p.most_tiles > warps ? of_win / 2 : of_win;
    p.win_warps = of_sel == 0
                      ? warps
                      : std::clamp((warps * weight + second / 2) / second, 1, std::min(of_win + 2, warps - p.cluster));
  }
  p.few = p.cluster > 1 ? few_of(r) : 0;
  p.by_few = Divisor(std::max(1, p.few));
  p.ratio = r.l_sel / r.d, p.lead = (r.l - 1) / r.d;
  p.by_scorers = Divisor(p.win_warps < warps ? warps - p.win_warps : warps);
}

void launch_step(const StepParams& p, Stream* stream) {
  if (p.shape.dtype == DType::bf16)
    launch_step_bf16(p, stream);
  else if (p.shape.dtype == DType::f16)
    launch_step_f16(p, stream);
  else
    launch_step_f32(p, stream);
}

}  // namespace

bool step_in_one(const AttentionArgs& a, Stream* stream) {
  if (!accepts(a)) return false;
  StepParams p = memory_of(a);
  divide(p);
  if (p.cluster > 0) launch_step(p, stream);
  return p.cluster > 0;
}

}  // namespace nsa::gpu
