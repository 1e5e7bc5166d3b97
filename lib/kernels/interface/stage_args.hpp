#pragma once
// The arguments of every stage.
//
// Conventions
// - All pointers are memory of the backend. `void*` is storage type (LayerShape::dtype), `float*` is fp32.
// - Shapes are this rank's: groups and heads are the local ones, H = groups * heads_per_group, head j of
//   group g is g * heads_per_group + j.
// - A stage is queued on its stream and returns. Nothing a stage does depends on host memory at run time: the
//   position is read from memory, so that one captured graph serves every step.
// - A partial of an attention (one branch, one row, one head) is (o, m, s): m is the running maximum of the scores, or
//   at most 8 ln 2 below it, s = sum exp(score - m), and o = sum exp(score - m) v is not normalised. A partial that
//   attended nothing has m = -inf, s = 0, o = 0. (m, s) is a softmax state, "ms" a buffer of them.

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "kernels/interface/layer_shape.hpp"
#include "kernels/shared/acceptance.hpp"
#include "kernels/shared/row_map.hpp"

namespace nsa {

/// Weights of the learned compression, one set each for K and V (paper, section 3.3.1), storage type.
struct PhiWeights {
  const void* pos = nullptr;  ///< [l, D]
  const void* w1 = nullptr;   ///< [l*D, phi_hidden]
  const void* w2 = nullptr;   ///< [phi_hidden, D]
};

/// This rank's weights of one layer.
struct LayerWeights {
  const void* w_qkv = nullptr;     ///< [dim, qkv_columns(shape)]: q heads, then k_sel v_sel (k_cmp v_cmp k_win v_win)
  const void* w_o = nullptr;       ///< [H*Dv, dim], the rows of the local heads
  const float* gate_w1 = nullptr;  ///< [Dk, Dk/2]
  const float* gate_b1 = nullptr;  ///< [Dk/2]
  const float* gate_w2 = nullptr;  ///< [Dk/2, 3]
  const float* gate_b2 = nullptr;  ///< [3]
  PhiWeights phi_k, phi_v;
};

/// Order of the K/V column blocks of w_qkv after the q heads: sel first, so that shared_kv is a prefix.
constexpr Branch kv_column_order[branches] = {sel, cmp, win};

constexpr std::int64_t qkv_columns(const LayerShape& s) {
  return std::int64_t{s.heads()} * s.d_k + std::int64_t{s.groups} * (s.d_k + s.d_v) * (s.shared_kv ? 1 : branches);
}

/// How attention divides the work between its stages.
struct AttentionPolicy {
  /// Prefill, where AttendKernel::recompute_scores allows it: rank computes the compressed scores itself, and attend of
  /// cmp stores neither scores nor lse.
  bool recompute_scores = false;
};

/// The part that the arguments of all stages have in common. It is built once a layer.
struct StageArgs {
  LayerShape shape;
  QueryTile tile;
  AttentionPolicy policy = {};
  void* scratch = nullptr;  ///< KernelTable::scratch_bytes() large; stages that run after one another share it
  std::size_t scratch_bytes = 0;
};

/// x -> q, k_c, v_c, gates. Q and k are rotated (RoPE, interleaved pairs, absolute position), v is not.
struct ProjectArgs : StageArgs {
  LayerWeights weights = {};
  void* x = nullptr;                ///< [rows, dim]; with `residual` not read, and undefined afterwards
  const float* residual = nullptr;  ///< [rows, dim]: x is rmsnorm of it (KernelTable::rmsnorm)
  void* q = nullptr;                ///< [rows, H, Dk]
  void* k[branches] = {};           ///< [rows, groups, Dk]; shared_kv: only [sel] is written
  void* v[branches] = {};           ///< [rows, groups, Dv]
  float* gate = nullptr;            ///< [rows, groups, 3]
  std::int32_t force_branch = -1;   ///< >= 0: one-hot gates
};

/// Writes the rows' k and v where the cache holds them, quantised where the cache is; other rows are skipped.
struct AppendArgs : StageArgs {
  const void* k = nullptr;  ///< [rows, groups, Dk]
  const void* v = nullptr;  ///< [rows, groups, Dv]
  KvView k_cache = {}, v_cache = {};
};

/// Forms every compressed token that completes at one of the tile's positions and that k_cmp holds. tile.tokens may be
/// a whole sequence. With `fill_halo`, also the copies in front of the following chunk (decode; prefill exchanges
/// them).
struct CompressArgs : StageArgs {
  PhiWeights phi_k = {}, phi_v = {};
  KvView k_raw = {}, v_raw = {};  ///< rows of cmp projections; token i is read from the chunk of its first position
  KvView k_cmp = {}, v_cmp = {};  ///< rows are compressed tokens
  bool fill_halo = false;
};

/// The partials of one branch: o [rows][H][Dv] and (m, s) [rows][H][2].
struct Partials {
  float* o = nullptr;
  float* ms = nullptr;
};

/// The partials of all branches lie in one buffer: o [3][rows][H][Dv], then (m, s) [3][rows][H][2].
constexpr std::int64_t partial_floats(const LayerShape& s, std::int64_t rows) {
  return branches * rows * s.heads() * (s.d_v + 2);
}
inline Partials partials_at(float* base, const LayerShape& s, std::int64_t rows, Branch b) {
  float* ms = base + branches * rows * s.heads() * s.d_v;
  return {base + b * rows * s.heads() * s.d_v, ms + b * rows * s.heads() * 2};
}

/// (m, s) that a rank stores of the compressed scores: its LSE buckets. Where ranks exchange them there is room for one
/// more, which carries the window's (m, s) where it is known by then (ShardedAttention).
constexpr std::int32_t lse_slots(const LayerShape& s, std::int32_t ranks) {
  return s.lse.buckets / ranks + (ranks > 1);
}

/// Attention of one branch over the K/V rows this rank holds.
/// - cmp: the valid compressed tokens. Also stores raw scores for `rank`, and (m, s) by LSE bucket: a segment is
///   lse.segment compressed tokens, reduced left to right; bucket x holds the segments c with c % lse.buckets = x,
///   reduced by rising c. So every kv layout forms the same buckets, bit for bit. A rank stores its buckets in order:
///   lse [buckets present][rows][H][2], bucket x at slot x / kv (x when it holds all chunks).
///   With policy.recompute_scores neither scores nor lse are written, and (m, s) of `out` even with scores_only.
/// - sel: tokens of `selected` at positions <= t.      - win: positions window_begin(t) .. t.
/// Tokens read are added to reads[batches * groups] as they are loaded.
struct AttendArgs : StageArgs {
  const void* q = nullptr;  ///< [rows, H, Dk]
  KvView k = {};            ///< padding_rows after the last plane may be read, and do not matter
  KvView v = {};            ///< finite also where no token was written yet: such rows may be multiplied by 0
  Partials out = {};
  std::int64_t* reads = nullptr;           ///< [batches, groups], of this branch
  const std::int32_t* selected = nullptr;  ///< sel: [rows, groups, n_sel], ascending, -1 padded
  float* lse = nullptr;                    ///< cmp
  void* scores = nullptr;                  ///< cmp: opaque, score_bytes() large, kept until rank
  bool scores_only = false;                ///< cmp: leave out the weighted sum (ablation)
};

struct Candidate {
  float score = 0;
  std::int32_t block = -1;  ///< -1: none
};

/// Importance of the selection blocks this rank holds (paper, equations 8 to 10) and the best n of them by
/// (score descending, block ascending), forced blocks first with score +inf.
struct RankArgs : StageArgs {
  const void* scores = nullptr;
  bool local_attention = false;  ///< `scores` are what ShardedAttention::local_attention stored, else attend of cmp
  const float* lse = nullptr;    ///< gathered: [ranks][lse_slots][rows][H][2], the first buckets / ranks of lse_slots
  std::int32_t lse_ranks = 1;    ///< kv when the buckets were exchanged, else 1
  RowMap cmp_map = {};           ///< of the compressed tokens that were scored
  RowMap token_map = {};         ///< of the selection K/V: whose block is whose
  const void* q = nullptr;       ///< policy.recompute_scores: [rows, H, Dk]; then k_cmp and (m, s) of the cmp partials
  KvView k_cmp = {};
  const float* cmp_ms = nullptr;     ///< [rows][H][2]
  Candidate* candidates = nullptr;   ///< [rows, groups, n_sel]; null when `selected` is wanted
  std::int32_t* selected = nullptr;  ///< [rows, groups, n_sel] ascending, -1 padded; a rank that holds all blocks
  float* p_slc = nullptr;            ///< optional [rows, groups, p_slc_blocks]: s[j], 0 where not held or not eligible
  std::int64_t p_slc_blocks = 0;
};

/// Candidates of all ranks -> the same n blocks on every rank.
struct SelectArgs : StageArgs {
  const Candidate* candidates = nullptr;  ///< [ranks][rows, groups, n_sel]
  std::int32_t ranks = 1;
  std::int32_t* selected = nullptr;
};

/// Merges the ranks' partials by rising rank, normalises, multiplies by the gates and adds the branches.
struct CombineArgs : StageArgs {
  const float* partials = nullptr;  ///< [ranks][partial_floats]
  std::int32_t ranks = 1;
  const float* gate = nullptr;     ///< [rows, groups, 3]
  bool leave_out[branches] = {};   ///< ablation: the branch was not computed and counts as zero
  void* o = nullptr;               ///< [rows, H, Dv] storage type
  float* o_branch[branches] = {};  ///< optional: normalised o_c [rows, H, Dv]
};

/// y = o W_O over the local heads; the sum over head shards is the caller's.
/// Heads [first, first + count) of a rank's H heads.
struct HeadRange {
  std::int32_t first = 0, count = 0;
};
/// The heads whose o a rank of `ranks` that share the sequences has after a sharded step in one launch.
constexpr HeadRange finished_heads(const LayerShape& s, std::int32_t ranks, std::int32_t rank) {
  const std::int32_t first = rank * s.heads() / ranks;
  return {first, (rank + 1) * s.heads() / ranks - first};
}

/// y of some heads alone: its sum over disjoint ranges is y of all.
struct OutputArgs : StageArgs {
  HeadRange heads;            ///< of o and y
  const void* o = nullptr;    ///< [rows, heads.count * Dv]
  const void* w_o = nullptr;  ///< [H*Dv, dim]
  float* y = nullptr;         ///< [rows, dim]
  float* residual = nullptr;  ///< optional [rows, dim]: += y
};

/// All that comes before a decode step's attention: project, append (in the order of Branch; cmp: the raw rows) and
/// compress, with the arguments they have one by one.
struct PrologueArgs {
  bool projects = false;  ///< else q, k, v and gate are given
  ProjectArgs project;
  AppendArgs append[branches];
  CompressArgs compress;
};

/// The attention of a decode step, or of a prefill tile: attend of every branch, rank and combine with the arguments
/// they have one by one (partials, `out` and `lse` aside, whose contents are undefined afterwards). combine.leave_out
/// holds for all of them.
struct AttentionArgs {
  AttendArgs attend[branches];
  RankArgs rank;  ///< `selected` wanted, lse_ranks = 1
  CombineArgs combine;
};

/// What the ranks of a sharded decode step exchange last, once the normalisers of cmp and win are known: the sum of
/// these two branches [rows][H][Dv], normalised over all ranks, times the gates; then the partial of sel, o
/// [rows][H][Dv] and (m, s) [rows][H][2]. Whole 16-byte vectors.
constexpr std::int64_t gated_partial_floats(const LayerShape& s, std::int64_t rows) {
  return (2 * rows * s.heads() * (s.d_v + 1) + 3) / 4 * 4;
}
inline Partials gated_partial_sel(float* base, const LayerShape& s, std::int64_t rows) {
  const std::int64_t values = rows * s.heads() * s.d_v;
  return {base + values, base + 2 * values};
}

/// A decode step's attention on one of the ranks that share its sequences.
struct ShardedAttentionArgs {
  AttendArgs attend[branches];       ///< of cmp and win; cmp's lse has room for the window's (m, s)
  const float* lse_all = nullptr;    ///< [ranks][lse_slots][rows][H][2]
  float* gated = nullptr;            ///< [gated_partial_floats]; null: local_attention stores ordinary partials
  const float* gated_all = nullptr;  ///< [ranks][gated_partial_floats]
  CombineArgs combine;               ///< ranks, gate, leave_out and o; the rest is not read
};

struct PeerMemory;  // opaque: memory through which the kernels of a group of ranks exchange by themselves

/// Phases of a sharded step in one launch, one after the other, as the first warp of a work item passes them. In those
/// named wait_ it waits for words of the other ranks, in the cluster_ ones for the other CTAs of its work item.
enum class StepPhase {
  attend_cmp,
  cluster_cmp,
  merge_lse,
  wait_lse,
  score_blocks,
  wait_candidates,
  attend_sel,
  merge_warps,
  cluster_merge,
  wait_states,
  merge_branches,
  wait_values
};
constexpr std::array step_phase_names = {"attend_cmp",    "cluster_cmp",     "merge_lse",      "wait_lse",
                                         "score_blocks",  "wait_candidates", "attend_sel",     "merge_warps",
                                         "cluster_merge", "wait_states",     "merge_branches", "wait_values"};
constexpr int step_phase_count = static_cast<int>(step_phase_names.size());
/// Readings of a work item: of its SM's clock when the step starts and at the end of each phase (0: it had none), then
/// of the device's clock, in nanoseconds, at the first and the last of these.
constexpr int step_readings = step_phase_count + 3;

/// End of a decode step: logs the counters and moves on. All memory is the backend's.
struct AdvanceArgs {
  std::int64_t* position = nullptr;   ///< [positions], each += kept_tokens of its sequence
  std::int64_t* step = nullptr;       ///< += 1
  std::int64_t* reads = nullptr;      ///< [counters], set to zero
  std::int64_t* reads_log = nullptr;  ///< [log_steps][counters], row *step is written when it exists
  std::int64_t counters = 0, log_steps = 0;
  const std::int32_t* selected = nullptr;  ///< [selected_count], logged beside the counters
  std::int32_t* selected_log = nullptr;    ///< [log_steps][selected_count]
  std::int64_t selected_count = 0;
  std::int64_t positions = 1;  ///< one, or one a sequence
  Acceptance acceptance = {};
};

/// What a decode step does around the attention of a layer, with the arguments of the stages: append (in the order of
/// Branch; cmp: the raw rows), compress, and after the last layer the end of the step. Counters and blocks go to row
/// *step of the logs, which is zero before the step, where it exists: reads of attend[b].reads to reads_log + (their
/// index in log.reads), blocks to selected_log + (their index in log.selected). log.reads itself is not written.
struct StepEnds {
  AppendArgs append[branches];
  CompressArgs compress;
  AdvanceArgs log;
  std::int64_t first_position = 0;  ///< *log.step = *log.position - first_position
  bool ends_step = false;           ///< the last layer: moves position and step on
};

/// A decode step's attention on one of the ranks that share its sequences, with the exchanges inside.
struct ShardedStepArgs {
  AttentionArgs attention;  ///< over this rank's rows; rank.selected wanted, p_slc and o_branch are not. o receives
                            ///< [rows][finished_heads.count][Dv]: each rank has other heads
  const PeerMemory* peers = nullptr;  ///< of the ranks, each on a GPU of its own; null: there is none
  bool exchanges = true;              ///< false: sends nothing and waits for nobody; o and `selected` are undefined
  std::int64_t* readings = nullptr;   ///< optional [rows * groups][step_readings], zeroed before
  std::optional<StepEnds> ends = {};  ///< what is around the attention, where the launch does it
};

/// Copies rows [first, last) between two maps of the same sequence. For every chunk c that dst holds and every
/// row i in [c*chunk + span_begin, c*chunk + span_end) and [first, last): dst row (c, i) = src row i, where src has it
/// (has_row, has_page) and dst writes it (writes_row). A row is quantised or dequantised where only one of the two is
/// quantised.
struct CopyRowsArgs {
  DType dtype = DType::f32;  ///< storage type
  KvView src, dst;
  std::int64_t planes = 0;
  std::int64_t first = 0, last = 0;
  std::int64_t span_begin = 0, span_end = 0;
};

/// dst rows [first, last) that dst holds = scale * synthetic_value(key, batch_begin + b, source_row(key, row, repeat),
/// column), with column = (group_begin + g) * width + e. The rows of a halo are filled too.
struct FillRowsArgs {
  DType dtype = DType::f32;
  KvView dst;
  std::int32_t batch = 1, groups = 1, group_begin = 0;
  std::int64_t first = 0, last = 0;
  std::uint64_t key = 0;
  float scale = 1.0f;
  std::uint64_t repeat = 0;      ///< of 2^32: how often a row repeats the one before it
  std::int32_t batch_begin = 0;  ///< b of the first plane of dst
  std::int64_t shared_rows = 0;  ///< rows before this one have the values of b = 0
};

/// *sum += checksum_term of every element of the rows [first, last) that the view has; its index is
/// (plane * last + row) * width + column; of the scale of a quantised row, (planes * width + plane) * last + row.
struct ChecksumArgs {
  DType dtype = DType::f32;
  KvView view;
  std::int64_t planes = 0;
  std::int64_t first = 0, last = 0;
  std::uint64_t* sum = nullptr;  ///< the backend's memory
};

/// One layer of a decode step up to output: project, attention and what is around it.
struct DecodeLayerArgs : StepEnds {
  bool projects = false;  ///< else q, k, v and gate are given
  ProjectArgs project = {};
  AttentionArgs attention = {};
};

}  // namespace nsa
