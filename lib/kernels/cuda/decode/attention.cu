// A decode step's attention on a rank that holds all K and V. In one kernel where that takes it
// (decode/fused/launch.cu); else cmp with win beside it, rank, sel, and one kernel that merges the parts of all three,
// normalises and weighs with the gates. No attention kernel waits for its splits to meet.
//
// Where cmp alone fills the GPU, every CTA takes a share of win and then one of cmp, so that all end together; where it
// does not, win has CTAs of its own.

#include <algorithm>

#include "kernels/cuda/attention/kv_tiles.cuh"
#include "kernels/cuda/decode/fused/params.cuh"
#include "kernels/cuda/decode/split_kv/merge_splits.cuh"
#include "kernels/cuda/decode/split_kv/stages.cuh"
#include "kernels/cuda/decode/stages.cuh"
#include "kernels/cuda/rank/stages.cuh"

namespace nsa::gpu {

namespace {

constexpr int threads = 128;

struct Meeting {
  CombineArgs a;
  const float* parts[branches];  // [list][splits][part]
  int splits[branches];
  int tiles, heads;  // head tiles of a group, heads of a tile
};

// A thread has 4 elements of a head.
template <class T>
__global__ void __launch_bounds__(threads) combine_parts(const __grid_constant__ Meeting p) {
  griddep_wait();
  const LayerShape& s = p.a.shape;
  const int quads = s.d_v / 4, item = blockIdx.x * threads + threadIdx.x, rh = item / quads, quad = item % quads;
  if (rh >= p.a.tile.rows() * s.heads()) return;
  const int group = rh / s.heads_per_group, in_group = rh % s.heads_per_group;  // group: of all rows
  const int head = in_group % p.heads;
  const std::int64_t list = std::int64_t{group} * p.tiles + in_group / p.heads;
  const std::int64_t part_floats = decode_part_floats(p.heads, s.d_v);
  float4 sum = {};
#pragma unroll
  for (int b = 0; b < branches; ++b) {
    if (p.a.leave_out[b]) continue;
    const float* part = p.parts[b] + list * p.splits[b] * part_floats;
    Sum2 total;
    float4 value = {};
    for (int i0 = 0; i0 < p.splits[b]; i0 += 4) {
      float2 ms[4];
      float4 x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i0 + i >= p.splits[b]) break;
        const float* from = part + (i0 + i) * part_floats;
        ms[i] = reinterpret_cast<const float2*>(from + p.heads * s.d_v)[head];
        x[i] = reinterpret_cast<const float4*>(from)[head * quads + quad];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i0 + i >= p.splits[b]) break;
        const float m = fmaxf(total.m, ms[i].x), old = exp2_fast(total.m - m), fresh = exp2_fast(ms[i].x - m);
        total = {m, total.s * old + ms[i].y * fresh};
        value.x = value.x * old + x[i].x * fresh, value.y = value.y * old + x[i].y * fresh;
        value.z = value.z * old + x[i].z * fresh, value.w = value.w * old + x[i].w * fresh;
      }
    }
    const float inverse = total.s > 0.0f ? 1.0f / total.s : 0.0f, gate = p.a.gate[group * branches + b];
    value.x *= inverse, value.y *= inverse, value.z *= inverse, value.w *= inverse;
    if (p.a.o_branch[b]) reinterpret_cast<float4*>(p.a.o_branch[b])[item] = value;
    sum.x += gate * value.x, sum.y += gate * value.y, sum.z += gate * value.z, sum.w += gate * value.w;
  }
  T* to = static_cast<T*>(p.a.o) + std::int64_t{item} * 4;
  store(to, sum.x), store(to + 1, sum.y), store(to + 2, sum.z), store(to + 3, sum.w);
}

DecodeJob job_of(Branch branch, const AttendArgs& a, int splits, float*& parts) {
  const std::int64_t lists = a.tile.rows() * a.shape.groups * decode_head_tiles(a.shape);
  const DecodeJob job{branch, splits, 0, a.k, a.v, a.reads, parts};
  parts += lists * splits * decode_part_floats(decode_heads(a.shape.dtype), a.shape.d_v);
  return job;
}

int splits_for(Branch branch, const AttendArgs& a) {
  return decode_splits(a.tile.rows() * a.shape.groups * decode_head_tiles(a.shape),
                       decode_tiles(branch, a.shape, a.k.map, a.tile.max_positions));
}

}  // namespace

bool decode_step_accepts(const AttentionArgs& a) {
  const LayerShape& s = a.combine.shape;
  const QueryTile& tile = a.combine.tile;
  bool reads = decode_accepts(s, tile) && a.combine.ranks == 1 && a.rank.lse_ranks == 1;
  for (int b = 0; b < branches; ++b) {
    const RowMap& map = a.attend[b].k.map;
    reads &= map.chunk == INT64_MAX && reads_kv_map(static_cast<Branch>(b), s, map);
  }
  return reads;
}

void decode_step(const AttentionArgs& a, Stream* stream) {
  const LayerShape& s = a.combine.shape;
  const QueryTile& tile = a.combine.tile;
  if (tile.rows() == 0) return;
  if (step_in_one(a, stream)) return;
  const AttendArgs& of_cmp = a.attend[cmp];
  const int row_groups = static_cast<int>(tile.rows()) * s.groups;
  const bool* leave_out = a.combine.leave_out;
  DecodeParams p{};
  p.shape = s;
  p.tile = tile;
  p.q = of_cmp.q;
  p.head_tiles = decode_head_tiles(s);
  const bool lanes_apart =
      !leave_out[sel] && meets_apart(cmp, 1, decode_tiles(cmp, s, of_cmp.k.map, tile.max_positions));
  p.end = leave_out[sel] || lanes_apart ? DecodeEnd::parts : DecodeEnd::lanes;
  p.arrivals = arrival_counters(cmp);
  p.scores = static_cast<float*>(of_cmp.scores);
  p.pitch = score_pitch(of_cmp.k.map, compressed_tokens(s.rules, tile.max_positions - 1));
  p.scores_only = of_cmp.scores_only;
  p.most_tiles = decode_tiles(cmp, s, of_cmp.k.map, tile.max_positions);
  p.lse = of_cmp.lse;
  p.leaves = static_cast<float2*>(of_cmp.scratch);
  float* parts = static_cast<float*>(of_cmp.scratch) + decode_leaf_floats(s, tile);

  const int cmp_splits = splits_for(cmp, of_cmp);
  const bool together = row_groups * p.head_tiles * cmp_splits > limits().sms;
  const DecodeJob cmp_job = job_of(cmp, of_cmp, cmp_splits, parts);
  DecodeJob win_job = job_of(win, a.attend[win], together ? cmp_splits : splits_for(win, a.attend[win]), parts);
  if (!together) win_job.first_cta = row_groups * cmp_splits;
  if (!leave_out[win]) p.jobs[p.job_count++] = win_job;
  p.jobs[p.job_count++] = cmp_job;
  launch_decode(p, stream);
  if (lanes_apart) launch_meeting({.walk = p, .lanes = true}, stream);

  const DecodeJob sel_job = job_of(sel, a.attend[sel], splits_for(sel, a.attend[sel]), parts);
  if (!leave_out[sel]) {
    rank(a.rank, stream);
    p.end = DecodeEnd::parts;
    p.selected = a.rank.selected;
    p.jobs[0] = sel_job;
    p.job_count = 1;
    launch_decode(p, stream);
  }

  const Meeting meeting{a.combine,
                        {cmp_job.parts, sel_job.parts, win_job.parts},
                        {cmp_job.splits, sel_job.splits, win_job.splits},
                        p.head_tiles,
                        decode_heads(s.dtype)};
  const std::int64_t items = tile.rows() * s.heads() * (s.d_v / 4);
  with_type(s.dtype, [&](auto type) {
    launch_pdl(combine_parts<decltype(type)>, dim3(static_cast<unsigned>((items + threads - 1) / threads)), threads, 0,
               stream, 1, meeting);
  });
}

}  // namespace nsa::gpu
