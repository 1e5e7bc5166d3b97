// A decode step's attention on one of several ranks that share its sequences, between the exchanges (ShardedStep).
//
// open: cmp with win beside it in one launch, cut into as many pieces as fill the GPU; a second one forms the lanes and
// the window's (m, sum), which travel together. weigh: once those of all ranks are there, the parts of both become one
// weighted vector a head. So the last exchange carries two vectors a head, that one and sel's, instead of three: one is
// not enough, because sel's normaliser is known only when all have told theirs. combine adds them up.
// Bytes: as decode/split_kv/branch.cu; the parts once more. Bound: memory bandwidth on long lists; else launches and
// exchanges.

#include <algorithm>

#include "kernels/cuda/decode/split_kv/merge_splits.cuh"
#include "kernels/cuda/decode/split_kv/stages.cuh"
#include "kernels/cuda/decode/stages.cuh"

namespace nsa::gpu {

namespace {

constexpr int threads = 128;

// What open() walks: the same for weigh().
DecodeParams walk_of(const ShardedAttentionArgs& a) {
  const AttendArgs &of_cmp = a.attend[cmp], &of_win = a.attend[win];
  const LayerShape& s = of_cmp.shape;
  const QueryTile& tile = of_cmp.tile;
  const std::int64_t lists = tile.rows() * s.groups * decode_head_tiles(s);
  DecodeParams p{};
  p.shape = s;
  p.tile = tile;
  p.q = of_cmp.q;
  p.head_tiles = decode_head_tiles(s);
  p.end = DecodeEnd::parts;
  p.scores = static_cast<float*>(of_cmp.scores);
  p.pitch = score_pitch(of_cmp.k.map, compressed_tokens(s.rules, tile.max_positions - 1));
  p.scores_only = of_cmp.scores_only;
  p.most_tiles = decode_tiles(cmp, s, of_cmp.k.map, tile.max_positions);
  if (leaves_sums(s)) p.sums = tile_sums(p.scores, p.most_tiles, decode_heads(s.dtype));
  p.keeps_scores =
      keeps_scores(p.sums.memory ? lists * p.sums.list_floats : std::int64_t{tile.rows()} * s.heads() * p.pitch);
  p.lse = of_cmp.lse;
  p.leaves = static_cast<float2*>(of_cmp.scratch);
  const int cmp_splits = decode_splits(lists, p.most_tiles);
  // Where cmp alone fills the GPU some of its CTAs take win too.
  const bool together = lists * cmp_splits > limits().sms;
  const int win_splits = std::min(decode_splits(lists, decode_tiles(win, s, of_win.k.map, tile.max_positions)),
                                  together ? cmp_splits : max_split_rows);
  if (!a.combine.leave_out[win])
    p.jobs[p.job_count++] = {win,
                             win_splits,
                             together ? 0 : static_cast<int>(tile.rows()) * s.groups * cmp_splits,
                             of_win.k,
                             of_win.v,
                             of_win.reads,
                             static_cast<float*>(of_win.scratch),
                             together ? cmp_splits : 0};
  p.jobs[p.job_count++] = {cmp,
                           cmp_splits,
                           0,
                           of_cmp.k,
                           of_cmp.v,
                           of_cmp.reads,
                           static_cast<float*>(of_cmp.scratch) + decode_leaf_floats(s, tile)};
  return p;
}

// A thread has 4 elements of a head.
template <class T>
__global__ void __launch_bounds__(threads) combine_ranks(const __grid_constant__ ShardedAttentionArgs a) {
  griddep_wait();
  const LayerShape& s = a.combine.shape;
  const std::int64_t rows = a.combine.tile.rows(), stride = gated_partial_floats(s, rows),
                     values = rows * s.heads() * s.d_v;
  const int quads = s.d_v / 4, item = blockIdx.x * threads + threadIdx.x, rh = item / quads;
  if (rh >= rows * s.heads()) return;
  const bool attends = !a.combine.leave_out[sel];
  float4 sum = {}, chosen = {};
  SoftmaxState total;
#pragma unroll 4
  for (int rank = 0; rank < a.combine.ranks; ++rank) {
    const float* from = a.gated_all + rank * stride;
    const float4 w = reinterpret_cast<const float4*>(from)[item];
    sum.x += w.x, sum.y += w.y, sum.z += w.z, sum.w += w.w;
    if (!attends) continue;
    const float2 ms = reinterpret_cast<const float2*>(from + 2 * values)[rh];
    const float4 x = reinterpret_cast<const float4*>(from + values)[item];
    if (ms.x == -INFINITY) continue;
    const float m = fmaxf(total.m, ms.x), old = exp_shifted(total.m, m), fresh = exp_shifted(ms.x, m);
    total = {m, total.s * old + ms.y * fresh};
    chosen.x = chosen.x * old + x.x * fresh, chosen.y = chosen.y * old + x.y * fresh;
    chosen.z = chosen.z * old + x.z * fresh, chosen.w = chosen.w * old + x.w * fresh;
  }
  if (total.s > 0.0f) {
    const float by = a.combine.gate[rh / s.heads_per_group * branches + sel] / total.s;
    sum.x += by * chosen.x, sum.y += by * chosen.y, sum.z += by * chosen.z, sum.w += by * chosen.w;
  }
  T* to = static_cast<T*>(a.combine.o) + std::int64_t{item} * 4;
  store(to, sum.x), store(to + 1, sum.y), store(to + 2, sum.z), store(to + 3, sum.w);
}

}  // namespace

bool decode_shard_accepts(const ShardedAttentionArgs& a) {
  const LayerShape& s = a.combine.shape;
  bool reads = decode_accepts(s, a.combine.tile) && a.combine.tile.rows() > 0 && a.combine.ranks > 1;
  for (const Branch b : {cmp, win}) reads &= reads_kv_map(b, s, a.attend[b].k.map);
  return reads && a.attend[cmp].k.map.rank != all_ranks;
}

void decode_open(const ShardedAttentionArgs& a, Stream* stream) {
  DecodeMeeting meeting{walk_of(a)};
  DecodeParams& walk = meeting.walk;
  launch_decode(walk, stream);
  const LayerShape& s = walk.shape;
  const std::int64_t lanes = s.lse.buckets / a.combine.ranks;
  meeting.lanes = true;
  meeting.sums = walk.lse + lanes * walk.tile.rows() * s.heads() * 2;
  if (!a.gated)
    for (int i = 0; i < walk.job_count; ++i)
      if (walk.jobs[i].branch == win || !walk.scores_only) meeting.out[i] = a.attend[walk.jobs[i].branch].out;
  launch_meeting(meeting, stream);
}

void decode_weigh(const ShardedAttentionArgs& a, Stream* stream) { launch_weighing(walk_of(a), a, stream); }

void decode_combine(const ShardedAttentionArgs& a, Stream* stream) {
  const LayerShape& s = a.combine.shape;
  const std::int64_t items = a.combine.tile.rows() * s.heads() * (s.d_v / 4);
  with_type(s.dtype, [&](auto type) {
    launch_pdl(combine_ranks<decltype(type)>, dim3(static_cast<unsigned>((items + threads - 1) / threads)), threads, 0,
               stream, 1, a);
  });
}

}  // namespace nsa::gpu
