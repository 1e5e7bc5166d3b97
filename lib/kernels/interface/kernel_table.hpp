#pragma once
// The seam between the algorithm and the hardware: one plain function pointer a stage, filled by the host or
// by the CUDA twin. lib/nsa calls these and nothing else of a backend.
//
// Conventions
// - All pointers are memory of the backend. `void*` is storage type (LayerShape::dtype), `float*` is fp32.
// - Shapes are this rank's: groups and heads are the local ones, H = groups * heads_per_group, head j of
//   group g is g * heads_per_group + j.
// - A stage is queued on its stream and returns. Nothing a stage does depends on host memory at run time: the
//   position is read from memory, so that one captured graph serves every step.
// - Partial results of an attention (one branch, one row, one head) are o = sum exp(s - m) v, unnormalised,
//   with m the running maximum, or at most 8 ln 2 below it, and s = sum exp(s - m). Nothing attended: m = -inf, s = 0,
//   o = 0.

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/shared/block_rules.hpp"
#include "kernels/shared/dtype.hpp"
#include "kernels/shared/row_map.hpp"

namespace nsa {

struct Stream;  // opaque, made by DeviceOps

enum Branch : std::int32_t { cmp = 0, sel = 1, win = 2 };
constexpr std::int32_t branches = 3;
constexpr const char* branch_names[branches] = {"cmp", "sel", "win"};

enum class GateKind : std::int32_t { softmax, sigmoid };
enum class PhiKind : std::int32_t { mean, mlp };

/// In which order the log-sum-exp of the compressed scores is reduced: the same on every kv layout, so that every
/// layout forms the same bits. AttendArgs says how.
struct LseLayout {
  std::int64_t segment = 64;  ///< consecutive compressed tokens reduced left to right: those of a KV chunk
  std::int32_t buckets = 24;  ///< running (m, sum) that segments are dealt to by turns; kv divides it
};

/// One layer as this rank sees it.
struct LayerShape {
  std::int32_t groups = 1;           ///< local KV groups
  std::int32_t heads_per_group = 1;  ///< h
  std::int32_t d_k = 64, d_v = 64;
  std::int32_t dim = 256;  ///< model width
  DType dtype = DType::f32;
  GateKind gate = GateKind::softmax;
  PhiKind phi = PhiKind::mean;
  std::int32_t phi_hidden = 0;
  bool shared_kv = false;  ///< every branch uses the sel projections
  double rope_base = 10000.0;
  BlockRules rules;
  LseLayout lse;
  constexpr std::int32_t heads() const { return groups * heads_per_group; }
};

/// The query rows a stage works on. Row r = i * tokens + j is sequence batch_begin + i at position
/// *first_position + j. Decode: tokens = 1. Prefill: consecutive positions, never across a chunk.
struct QueryTile {
  std::int32_t batch_begin = 0, batches = 1, tokens = 1;
  const std::int64_t* first_position = nullptr;
  std::int64_t max_positions = 0;  ///< no position of any row reaches this: sizes launches and scratch
  bool rescores = false;  ///< prefill, where AttendKernel::rescores: rank forms the scores, attend_cmp leaves none
  constexpr std::int64_t rows() const { return std::int64_t{batches} * tokens; }
};

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

/// Order of the K/V column blocks of w_qkv behind the q heads: sel first, so that shared_kv is a prefix.
constexpr Branch kv_column_order[branches] = {sel, cmp, win};

constexpr std::int64_t qkv_columns(const LayerShape& s) {
  return std::int64_t{s.heads()} * s.d_k + std::int64_t{s.groups} * (s.d_k + s.d_v) * (s.shared_kv ? 1 : branches);
}

/// x -> q, k_c, v_c, gates. Q and k are rotated (RoPE, interleaved pairs, absolute position), v is not.
struct ProjectArgs {
  LayerShape shape;
  QueryTile tile;
  LayerWeights weights;
  const void* x = nullptr;         ///< [rows, dim]
  void* q = nullptr;               ///< [rows, H, Dk]
  void* k[branches] = {};          ///< [rows, groups, Dk]; shared_kv: only [sel] is written
  void* v[branches] = {};          ///< [rows, groups, Dv]
  float* gate = nullptr;           ///< [rows, groups, 3]
  std::int32_t force_branch = -1;  ///< >= 0: one-hot gates
  void* scratch = nullptr;
  std::size_t scratch_bytes = 0;
};

/// Writes the rows' k and v where the cache holds them; other rows are skipped.
struct AppendArgs {
  LayerShape shape;
  QueryTile tile;
  const void* k = nullptr;  ///< [rows, groups, Dk]
  const void* v = nullptr;  ///< [rows, groups, Dv]
  KvView k_cache, v_cache;
};

/// Forms every compressed token that completes at one of the tile's positions and that k_cmp holds.
/// With `fill_halo`, also the copies in front of the following chunk (decode; prefill exchanges them).
struct CompressArgs {
  LayerShape shape;
  QueryTile tile;  ///< tokens may be a whole sequence
  PhiWeights phi_k, phi_v;
  KvView k_raw, v_raw;  ///< rows of cmp projections; token i is read from the chunk of its first position
  KvView k_cmp, v_cmp;  ///< rows are compressed tokens
  bool fill_halo = false;
  void* scratch = nullptr;
  std::size_t scratch_bytes = 0;
};

/// One row's partial results over all rows, heads and branches: o [3][rows][H][Dv], then (m, s) [3][rows][H][2].
struct Partials {
  float* o = nullptr;
  float* ms = nullptr;
};

constexpr std::int64_t partial_floats(const LayerShape& s, std::int64_t rows) {
  return branches * rows * s.heads() * (s.d_v + 2);
}
inline Partials partials_at(float* base, const LayerShape& s, std::int64_t rows, Branch b) {
  float* ms = base + branches * rows * s.heads() * s.d_v;
  return {base + b * rows * s.heads() * s.d_v, ms + b * rows * s.heads() * 2};
}

/// (m, s) a rank keeps of the compressed scores: its lanes. Where ranks exchange them there is room for one more, which
/// carries the window's where those are known by then (ShardedStep).
constexpr std::int32_t lse_slots(const LayerShape& s, std::int32_t ranks) {
  return s.lse.buckets / ranks + (ranks > 1);
}

/// Attention of one branch over the K/V rows this rank holds.
/// - cmp: the valid compressed tokens. Also leaves raw scores for `rank` and (m, s) by lane: leaf =
///   shape.leaf compressed tokens, reduced left to right; lane = leaves c with c % lanes equal, reduced by
///   rising c. So every kv layout forms the same lanes, bit for bit. A rank stores its lanes in order:
///   lse [lanes present][rows][H][2], lane x at slot x / kv (x when it holds all chunks).
///   With tile.rescores neither scores nor lse are written, and (m, s) of `out` even with scores_only.
/// - sel: tokens of `selected` at positions <= t.      - win: positions window_begin(t) .. t.
/// Tokens read are added to reads[batches * groups] as they are loaded.
struct AttendArgs {
  LayerShape shape;
  QueryTile tile;
  const void* q = nullptr;  ///< [rows, H, Dk]
  KvView k;                 ///< padding_rows behind the last plane may be read, and do not matter
  KvView v;                 ///< finite also where no token was written yet: such rows may be weighed with 0
  Partials out;
  std::int64_t* reads = nullptr;           ///< [batches, groups], of this branch
  const std::int32_t* selected = nullptr;  ///< sel: [rows, groups, n_sel], ascending, -1 padded
  float* lse = nullptr;                    ///< cmp
  void* scores = nullptr;                  ///< cmp: opaque, score_bytes() large, kept until rank
  bool scores_only = false;                ///< cmp: leave out the weighted sum (ablation)
  void* scratch = nullptr;
  std::size_t scratch_bytes = 0;
};

struct Candidate {
  float score = 0;
  std::int32_t block = -1;  ///< -1: none
};

/// Importance of the selection blocks this rank holds (section 2.5 of the design) and the best n of them by
/// (score descending, block ascending), forced blocks first with score +inf.
struct RankArgs {
  LayerShape shape;
  QueryTile tile;
  const void* scores = nullptr;
  bool opened = false;         ///< `scores` are what ShardedStep::open left, else attend_cmp
  const float* lse = nullptr;  ///< gathered: [ranks][lse_slots][rows][H][2], of which lanes / ranks are lanes
  std::int32_t lse_ranks = 1;  ///< kv when the lanes were exchanged, else 1
  RowMap cmp_map;              ///< of the compressed tokens that were scored
  RowMap token_map;            ///< of the selection K/V: whose block is whose
  const void* q = nullptr;     ///< tile.rescores: [rows, H, Dk]; then k_cmp and (m, s) of the cmp partials
  KvView k_cmp;
  const float* cmp_ms = nullptr;     ///< [rows][H][2]
  Candidate* candidates = nullptr;   ///< [rows, groups, n_sel]; null when `selected` is wanted
  std::int32_t* selected = nullptr;  ///< [rows, groups, n_sel] ascending, -1 padded; a rank that holds all blocks
  float* p_slc = nullptr;            ///< optional [rows, groups, p_slc_blocks]: s[j], 0 where not held or not eligible
  std::int64_t p_slc_blocks = 0;
  void* scratch = nullptr;
  std::size_t scratch_bytes = 0;
};

/// Candidates of all ranks -> the same n blocks on every rank.
struct SelectArgs {
  LayerShape shape;
  QueryTile tile;
  const Candidate* candidates = nullptr;  ///< [ranks][rows, groups, n_sel]
  std::int32_t ranks = 1;
  std::int32_t* selected = nullptr;
};

/// Merges the ranks' partials by rising rank, normalises, weighs with the gates.
struct CombineArgs {
  LayerShape shape;
  QueryTile tile;
  const float* partials = nullptr;  ///< [ranks][partial_floats]
  std::int32_t ranks = 1;
  const float* gate = nullptr;     ///< [rows, groups, 3]
  bool leave_out[branches] = {};   ///< ablation: the branch was not computed and counts as zero
  void* o = nullptr;               ///< [rows, H, Dv] storage type
  float* o_branch[branches] = {};  ///< optional: normalised o_c [rows, H, Dv]
};

/// What comes before a decode step's attention as a whole: project, append (in the order of Branch; cmp: the raw rows)
/// and compress with the arguments they would have one by one.
struct PrologueArgs {
  bool projects = false;  ///< else q, k, v and gate are given
  ProjectArgs project;
  AppendArgs append[branches];
  CompressArgs compress;
};

/// The attention of a decode step, or of a prefill tile, as a whole: attend of every branch, rank and combine with the
/// arguments they would have one by one (partials, `out` and `lse` aside, which may hold anything behind it).
/// combine.leave_out holds for all of them.
struct AttentionArgs {
  AttendArgs attend[branches];
  RankArgs rank;  ///< `selected` wanted, lse_ranks = 1
  CombineArgs combine;
};

/// What the ranks of a sharded decode step tell each other at its end where the normalisers of cmp and win are known by
/// then: [rows][H][Dv] of the two together, normalised over all ranks, times the gates; then of sel the partial o
/// [rows][H][Dv] and (m, s) [rows][H][2]. Whole 16-byte vectors.
constexpr std::int64_t weighted_floats(const LayerShape& s, std::int64_t rows) {
  return (2 * rows * s.heads() * (s.d_v + 1) + 3) / 4 * 4;
}
inline Partials weighted_sel(float* base, const LayerShape& s, std::int64_t rows) {
  const std::int64_t values = rows * s.heads() * s.d_v;
  return {base + values, base + 2 * values};
}

/// A decode step's attention on one of the ranks that share its sequences.
struct ShardedAttentionArgs {
  AttendArgs attend[branches];      ///< of cmp and win; cmp's lse has room for the window's (m, s)
  const float* lse_all = nullptr;   ///< [ranks][lse_slots][rows][H][2]
  float* weighted = nullptr;        ///< [weighted_floats]; null: open() leaves ordinary partials of cmp and win instead
  const float* gathered = nullptr;  ///< [ranks][weighted_floats]
  CombineArgs combine;              ///< ranks, gate, leave_out and o; the rest is not looked at
};

/// The launches between the exchanges of such a step: open, exchange lse; rank; weigh, which needs lse_all alone,
/// beside the exchange of candidates; select, attend sel into weighted_sel(); exchange `weighted`; combine. The same
/// blocks are chosen as stage by stage.
struct ShardedAttention {
  bool (*accepts)(const ShardedAttentionArgs&);
  void (*open)(const ShardedAttentionArgs&, Stream*);   ///< cmp with win: scores, lse, window's (m, s) behind the lanes
  void (*weigh)(const ShardedAttentionArgs&, Stream*);  ///< writes the cmp and win part of `weighted`
  void (*combine)(const ShardedAttentionArgs&, Stream*);  ///< o of the gathered ones
};

/// y = o W_O over the local heads; the sum over head shards is the caller's.
struct OutputArgs {
  LayerShape shape;
  std::int64_t rows = 0;
  const void* o = nullptr;    ///< [rows, H*Dv]
  const void* w_o = nullptr;  ///< [H*Dv, dim]
  float* y = nullptr;         ///< [rows, dim]
  void* scratch = nullptr;
  std::size_t scratch_bytes = 0;
};

/// Copies rows [first, last) between two maps of the same sequence. For every chunk c that dst holds and every
/// row i in [c*chunk + span_begin, c*chunk + span_end) and [first, last): dst row (c, i) = src row i, where src has it.
struct CopyRowsArgs {
  DType dtype = DType::f32;
  KvView src, dst;
  std::int64_t planes = 0;
  std::int64_t first = 0, last = 0;
  std::int64_t span_begin = 0, span_end = 0;
};

/// dst rows [first, last) that dst holds = scale * synthetic_value(key, b, row, column), with column =
/// (group_begin + g) * width + e. The rows of a halo are filled too.
struct FillRowsArgs {
  DType dtype = DType::f32;
  KvView dst;
  std::int32_t batch = 1, groups = 1, group_begin = 0;
  std::int64_t first = 0, last = 0;
  std::uint64_t key = 0;
  float scale = 1.0f;
};

/// *sum += checksum_term of every element of the rows [first, last) that the view has; its place is
/// (plane * last + row) * width + column.
struct ChecksumArgs {
  DType dtype = DType::f32;
  KvView view;
  std::int64_t planes = 0;
  std::int64_t first = 0, last = 0;
  std::uint64_t* sum = nullptr;  ///< the backend's memory
};

/// End of a decode step: logs the counters and moves on. All memory is the backend's.
struct AdvanceArgs {
  std::int64_t* position = nullptr;   ///< += 1
  std::int64_t* step = nullptr;       ///< += 1
  std::int64_t* reads = nullptr;      ///< [counters], set to zero
  std::int64_t* reads_log = nullptr;  ///< [log_steps][counters], row *step is written when it exists
  std::int64_t counters = 0, log_steps = 0;
  const std::int32_t* selected = nullptr;  ///< [selected_count], logged beside the counters
  std::int32_t* selected_log = nullptr;    ///< [log_steps][selected_count]
  std::int64_t selected_count = 0;
};

/// One implementation of a branch. `sdpa` is there for every branch and accepts every shape: what others fall back to.
struct AttendKernel {
  const char* name;  ///< "sdpa", "masked", "fused", "flash"
  bool (*accepts)(const LayerShape&, const QueryTile&);
  /// Throws LaunchError where it could not be queued and nothing is lost: another may then run on the same arguments.
  void (*run)(const AttendArgs&, Stream*);
  /// cmp: whether rank forms the scores of prefill tiles itself, on whole or gathered caches. The shape alone decides,
  /// so that every kv layout and every tile of it chooses by the same bits. Null: never.
  bool (*rescores)(const LayerShape&) = nullptr;
  /// Bytes of scratch it wants when they are more than KernelTable::scratch_bytes; null: never.
  std::size_t (*scratch)(const LayerShape&, const QueryTile&) = nullptr;
  /// Where it is several kernels: the name of the one that `run` takes for these arguments. Null: it is one.
  const char* (*variant)(const AttendArgs&) = nullptr;
  const char* variant_name(const AttendArgs& a) const { return variant ? variant(a) : name; }
};

struct KernelTable {
  void (*project)(const ProjectArgs&, Stream*);
  void (*append)(const AppendArgs&, Stream*);
  void (*compress)(const CompressArgs&, Stream*);
  std::span<const AttendKernel> attend[branches];  ///< never empty; the first accepts every shape
  void (*rank)(const RankArgs&, Stream*);
  void (*select)(const SelectArgs&, Stream*);
  void (*combine)(const CombineArgs&, Stream*);
  void (*output)(const OutputArgs&, Stream*);
  /// out [rows, dim] storage = x / sqrt(mean(x^2) + 1e-6), or x itself when `normalise` is false.
  void (*rmsnorm)(const LayerShape&, std::int64_t rows, const float* x, void* out, bool normalise, Stream*);
  /// x [count] += y.
  void (*add)(std::int64_t count, float* x, const float* y, Stream*);
  void (*copy_rows)(const CopyRowsArgs&, Stream*);
  void (*fill_rows)(const FillRowsArgs&, Stream*);
  void (*advance)(const AdvanceArgs&, Stream*);
  /// Bytes of `scores` for a tile of that many rows when the rank holds `cmp_rows` memory rows of compressed tokens.
  std::size_t (*score_bytes)(const LayerShape&, const QueryTile&, std::int64_t cmp_rows);
  /// Bytes of `scratch` that suffice for every stage on such a tile; AttendKernel::scratch says who wants more.
  std::size_t (*scratch_bytes)(const LayerShape&, const QueryTile&);
  /// Rows a prefill tile has at most, and bytes that its scores may take.
  std::int32_t tile_tokens;
  std::size_t tile_budget;
  void (*checksum)(const ChecksumArgs&, Stream*);
  /// tokens = 1. Null where the backend has no such thing.
  void (*decode_prologue)(const PrologueArgs&, Stream*) = nullptr;
  /// The same as its stages one by one, same blocks chosen, in fewer launches; for what decode_step_accepts. Null where
  /// the backend has no such thing.
  bool (*decode_step_accepts)(const AttentionArgs&) = nullptr;
  void (*decode_step)(const AttentionArgs&, Stream*) = nullptr;
  /// The same of a prefill tile: same blocks chosen, no partials kept.
  bool (*prefill_step_accepts)(const AttentionArgs&) = nullptr;
  void (*prefill_step)(const AttentionArgs&, Stream*) = nullptr;
  const ShardedAttention* sharded = nullptr;  ///< null where the backend has no such thing
  std::size_t exchange_bytes = 0;  ///< of the device, that a group of ranks takes at most to exchange through
};

}  // namespace nsa
