#pragma once
// A decode step's attention in one launch: a cluster of 1 to 16 CTAs a (row, group), one CTA of 8 warps an SM.
//
// Tiling: cmp's tiles of 32 tokens are dealt to all warps of the cluster; then some warps take the window and the rest
// the chosen blocks (decode/fused/tile_stream.cuh). In between, the tiles' (m, sum) and sums of blocks meet in the L2,
// and those who take the chosen blocks score and choose them (decode/fused/rank.cuh), while the window's warps go on.
// At the end a CTA adds up its warps' o by branch and sends every CTA of the cluster the columns that one merges,
// normalises and weighs with the gates. Sums: of blocks, by tile (attention/block_sums.cuh); where the shape has none,
// raw scores.
//
// Bytes: K and V once, and 9/8 * heads / (2 * Dk + 2 * Dv) of those of cmp written and read again as sums of blocks
// (raw scores: 4 * heads / (2 * Dk + 2 * Dv)). Bound: memory bandwidth from some 16 lists of 64K on; with few lists the
// chain launch, cmp, choice, sel, merge, three meetings of the cluster in it: what counts there are instructions on the
// way, at 4 to 5 cycles each.

#include "kernels/cuda/decode/fused/merge.cuh"

namespace nsa::gpu {

template <class E, int W, bool Sums>
struct Step {
  using T = typename E::Type;
  using Layout = StepLayout<E, W>;
  using Rank = StepRank<E, W, Sums>;
  static constexpr int threads = 32 * W;
  const StepParams& p;
  char* shared;
  StepPlace at;
  StepWalk<E, W> walk;
  int win_tiles, sel_tiles;
  bool joined = false;  // a meeting of the cluster that is still to be left
  std::uint64_t scores_policy;

  // What the launch alone says; then, when the predecessor is done, what the position says.
  __device__ __forceinline__ Step(const StepParams& params, char* memory) : p(params), shared(memory) {
    const LayerShape& s = p.shape;
    at.list = p.by_cluster(static_cast<int>(blockIdx.x));
    at.cta = static_cast<int>(blockIdx.x) - at.list * p.cluster;
    at.row = p.groups(at.list), at.group = at.list - at.row * s.groups;
    at.present = s.heads_per_group;
    at.head0 = at.row * s.heads() + at.group * s.heads_per_group;
    at.warp = threadIdx.x / 32;
    at.among = at.warp * p.cluster + at.cta;
    at.warps = W * p.cluster;
    at.scorers = at.warps - p.win_warps;
    at.rankers = min(W, p.by_cluster(max(0, at.scorers - at.cta + p.cluster - 1)));
    Rank{p, at, shared}.prepare();
    walk.scores_only = p.scores_only;
    walk.ring = shared_address(shared) + at.warp * Layout::ring_bytes;
    walk.policy = cache_policy(p.keeps_scores ? CacheHint::evict_first : CacheHint::evict_normal);
    scores_policy = cache_policy(CacheHint::evict_last);
    deal();
  }
  __device__ __forceinline__ void start() {
    const std::int64_t t = *p.tile.first_position;
    E::copy_queries(shared_address(shared) + Layout::queries,
                    static_cast<const T*>(p.q) + std::int64_t{at.head0} * E::d_k, at.present, threadIdx.x, threads);
    if (threadIdx.x < branches)
      cp_async_word(shared_address(shared) + Layout::gates + threadIdx.x * 4, p.gate + at.list * branches + threadIdx.x,
                    true);
    cp_async_commit();
    const BlockRules& r = p.shape.rules;
    at.t = static_cast<int>(t);
    at.n = at.t + 1 < r.l ? 0 : p.stride(at.t + 1 - r.l) + 1;
    at.eligible = p.block(at.t) + 1;
    plan();
    cp_async_wait<Layout::slots>();  // the queries, the gates
    __syncthreads();
  }

  __device__ __forceinline__ Course* courses() const {
    return reinterpret_cast<Course*>(shared + Layout::courses) + at.warp * 2;
  }
  // Which tiles this warp takes; how many there are hangs on the position. The last warps take the window.
  __device__ __forceinline__ void deal() {
    const int from_last = at.warps - 1 - at.among, per_leaf = tiles_per_unit(cmp, p.shape);
    walk.chooses = from_last >= p.win_warps;
    walk.courses = courses();
    if (threadIdx.x % 32 == 0) put_courses(from_last, per_leaf);
    __syncwarp();
    // The first tile comes to the L2 while the predecessor works.
    const Piece first = walk.piece(0, at.among);
    __syncwarp();  // plan() writes what it was read from
    if (threadIdx.x % 32 != 0 || first.count <= 0) return;
    prefetch_l2(courses()[0].k + std::int64_t{first.row} * E::k_bytes, first.count * E::k_bytes);
    if (!p.scores_only) prefetch_l2(courses()[0].v + std::int64_t{first.row} * E::v_bytes, first.count * E::v_bytes);
  }
  __device__ __forceinline__ void put_courses(int from_last, int per_leaf) const {
    const LayerShape& s = p.shape;
    const std::int64_t plane = (p.tile.batch_begin + at.row) * s.groups + at.group;
    const auto rows_of = [&](const KvView& view) {
      return static_cast<const char*>(view.data) + plane * view.plane_stride * static_cast<int>(sizeof(T));
    };
    const Branch second = walk.chooses ? sel : win;
    const int unit = walk.chooses ? s.rules.l_sel : window_unit;
    courses()[0] = {
        rows_of(p.k[cmp]), rows_of(p.v[cmp]), at.among, at.warps, 0, static_cast<int>(s.lse.segment), per_leaf, 0, 0,
        p.most_tokens};
    courses()[1] = {rows_of(p.k[second]),
                    rows_of(p.v[second]),
                    walk.chooses ? from_last - p.win_warps : from_last,
                    walk.chooses ? at.scorers : p.win_warps,
                    0,
                    unit,
                    (unit + tile_rows - 1) / tile_rows,
                    0,
                    0,
                    0};
  }

  // How many there are, and what of them is known before blocks are chosen.
  __device__ __forceinline__ void plan() {
    const LayerShape& s = p.shape;
    const BlockRules& r = s.rules;
    const WindowRows rows = window_rows(r, p.k[win].map, at.t);
    const int begin = static_cast<int>(rows.begin), end = static_cast<int>(rows.end), first_unit = begin / window_unit;
    win_tiles =
        p.leave_out[win] || end <= begin ? 0 : ((end - 1) / window_unit - first_unit + 1) * tiles_per_unit(win, s);
    sel_tiles = p.leave_out[sel] ? 0 : r.n_sel * tiles_per_unit(sel, s);
    if (threadIdx.x % 32 == 0) {
      const int leaf = static_cast<int>(s.lse.segment);
      Course &first = courses()[0], &second = courses()[1];
      first.count = p.leaf(at.n + leaf - 1) * tiles_per_unit(cmp, s);
      first.unit0 = first.low = 0, first.high = at.n;
      second.count = walk.chooses ? sel_tiles : win_tiles;
      second.unit0 = walk.chooses ? 0 : first_unit;
      second.low = walk.chooses ? 0 : begin, second.high = walk.chooses ? at.t + 1 : end;
    }
    __syncwarp();
    const int lane = threadIdx.x % 32;
    const bool all = at.eligible <= r.n_sel;
    const int sure = all ? r.n_sel : r.n_init + r.n_local;
    int block = lane < r.n_init ? lane : at.eligible - r.n_local + (lane - r.n_init);
    if (all) block = lane < at.eligible ? lane : -1;
    walk.chosen = lane < sure ? block : -1;
    walk.start(!walk.chooses ? win_tiles : sel_tiles == 0 ? 0 : sure * tiles_per_unit(sel, s));
  }

  __device__ __forceinline__ void attend(E& e, int course) {
    const Course& c = walk.courses[course];
    const bool weighs = course == 1 || !p.scores_only;
    float2* sums = p.leaves + at.list * p.most_tiles * E::heads;
    int tokens = 0;
#pragma unroll 1
    for (int i = c.first; i < c.count; i += c.step) {
      const Piece now = walk.piece(course, i);
      if (now.count <= 0) {
        if (course == 0 && threadIdx.x % 32 < E::heads)
          sums[i * E::heads + threadIdx.x % 32] = make_float2(neg_inf, 0.0f);
        continue;
      }
      walk.take([&](unsigned from) { e.scores(from); });
      e.scale();
      if constexpr (Sums) {
        SumRows blocks;
        if (course == 0)
          blocks = {p.sums.sums(at.list, i), p.sums.fronts(at.list, i + 1), p.keeps_scores, scores_policy};
        if (course == 0) e.put_last(blocks, now.count);
        e.soften(now.count, blocks);
      } else {
        if (course == 0)
          e.put_scores({p.scores + at.head0 * p.pitch + now.row, p.pitch, p.keeps_scores, scores_policy}, now.count,
                       at.present);
        e.soften(now.count);
      }
      if (course == 0) e.put_tile(sums + i * E::heads);
      if (weighs) walk.take([&](unsigned from) { e.add(from); });
      tokens += now.count;
    }
    if (threadIdx.x % 32 == 0 && tokens > 0) {
      std::int64_t* reads = course == 0 ? p.reads[cmp] : walk.chooses ? p.reads[sel] : p.reads[win];
      atomicAdd(reinterpret_cast<unsigned long long*>(reads) + at.list, static_cast<unsigned long long>(tokens));
    }
  }

  // Between the two courses. The window's warps do not wait for the choice; they join the meeting in it before that
  // begins, and leave it when they have their window.
  __device__ __forceinline__ void choose() {
    const BlockRules& r = p.shape.rules;
    if (p.cluster > 1)  // the tiles' sums are there, and the others have started: their memory may be written to
      cluster_barrier();
    else
      __syncthreads();
    if (p.leave_out[sel]) return;
    const bool all = at.eligible <= r.n_sel, scores = !all || p.p_slc;
    if (!walk.chooses) {
      joined = scores && p.cluster > 1;
      if (joined) join_cluster();
      return;
    }
    if (scores) {
      const int best = Rank{p, at, shared}.choose(walk.courses[0].count, walk.courses[0].tiles_per_unit);
      if (!all && threadIdx.x % 32 >= r.n_init + r.n_local) walk.chosen = best;
    }
    walk.release();
    if (at.among == 0) put_chosen();
  }
  __device__ __forceinline__ StepMerge<E, W> merge() const {
    return {p, at, shared, walk.courses[0].count, sel_tiles, win_tiles};
  }
  // By rising block.
  __device__ __forceinline__ void put_chosen() const {
    const int lane = threadIdx.x % 32, n = p.shape.rules.n_sel, mine = walk.chosen;
    int place = 0;
#pragma unroll 1
    for (int other = 0; other < n; ++other) {
      const int block = __shfl_sync(0xffffffffu, mine, other);
      place += block >= 0 && block < mine;
    }
    if (lane < n) p.selected[std::int64_t{at.list} * n + (mine < 0 ? lane : place)] = mine;
  }
};

template <class E, int W, bool Sums>
__global__ void __launch_bounds__(32 * W, step_warps / W) step_kernel(const __grid_constant__ StepParams p) {
  using Layout = StepLayout<E, W>;
  extern __shared__ __align__(128) char shared[];
  Step<E, W, Sums> step(p, shared);
  griddep_wait();
  step.start();
  const auto engine = [&] {
    return E(shared + Layout::queries, shared + Layout::weights + step.at.warp * E::weight_bytes);
  };
  E of_cmp = engine(), e = engine();
#pragma unroll 1
  for (int course = 0;; ++course) {
    step.attend(e, course);
    if (course == 1) break;
    of_cmp = e;
    e = engine();
    step.choose();
  }
  if (step.joined) cluster_wait();
  const auto merge = step.merge();
  merge.send(of_cmp, e, step.walk.chooses);
  if (W < step_warps || p.cluster == 1) return;
  cluster_barrier();
  merge.merge();
}

template <class E>
int count_clusters(const LayerShape& s, int cluster) {
  static int known[most_step_cluster + 1];  // one more, 0: not asked yet
  constexpr auto* kernel = step_kernel<E, step_warps, true>;
  const std::size_t bytes = StepLayout<E, step_warps>::bytes(s);
  if (bytes > limits().shared_bytes) return 0;
  if (known[cluster] > 0) return known[cluster] - 1;
  cudaLaunchAttribute size{};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(limits().sms * cluster));
  config.blockDim = dim3(32 * step_warps);
  config.dynamicSmemBytes = bytes;
  config.attrs = &size;
  config.numAttrs = 1;
  int count = 0;
  const bool answered =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)) ==
          cudaSuccess &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, cluster > 8) == cudaSuccess &&
      cudaOccupancyMaxActiveClusters(&count, kernel, &config) == cudaSuccess;
  if (!answered) {
    cudaGetLastError();  // such clusters there are not
    count = 0;
  }
  known[cluster] = count + 1;
  return count;
}

template <class E>
void launch_step_of(const StepParams& p, Stream* stream) {
  const dim3 grid(static_cast<unsigned>(p.tile.rows() * p.shape.groups * p.cluster));
  const auto launch = [&](auto* kernel, int bytes) {
    launch_pdl(kernel, grid, 32 * p.warps, bytes, stream, p.cluster, p);
  };
  const auto launch_of = [&](auto sums) {
    if (p.warps == step_warps)
      launch(step_kernel<E, step_warps, sums>, StepLayout<E, step_warps>::bytes(p.shape));
    else
      launch(step_kernel<E, step_warps_of_many, sums>, StepLayout<E, step_warps_of_many>::bytes(p.shape));
  };
  if (p.sums.memory)
    launch_of(std::true_type{});
  else
    launch_of(std::false_type{});
}

}  // namespace nsa::gpu
