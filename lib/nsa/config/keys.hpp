#pragma once
// The one list of the keys of the input: name, field, allowed values, unit and meaning. Parsing, suggestions for
// unknown keys, range checks, parameters, to_toml and `nsa info --keys` are visitors of this list.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

#include "kernels/shared/acceptance.hpp"
#include "nsa/config/config.hpp"

namespace nsa {

/// A name in the input and its value.
template <class T>
struct Choice {
  const char* name;
  T value;
};

struct AnyValue {};  ///< bool or string: every value is allowed

struct Range {
  std::int64_t least = 1, most = std::numeric_limits<std::int32_t>::max();
};

/// A list with one value a sequence, in their order; it may be empty or hold a value twice.
struct EachSequence {
  Range range;
};

struct AutoOr {  ///< "auto" (stored as 0), or an integer of the range but 0
  Range range;
};

struct AllOrShare {};  ///< "all" (stored as 1), or a number from 0 to 1

struct RealRange {
  double least, most;
};

inline constexpr Choice<TaskKind> task_kinds[] = {{"decode", TaskKind::decode},
                                                  {"prefill", TaskKind::prefill},
                                                  {"mixed", TaskKind::mixed},
                                                  {"kernels", TaskKind::kernels},
                                                  {"needle", TaskKind::needle}};
inline constexpr Choice<DType> precisions[] = {{"fp32", DType::f32}, {"bf16", DType::bf16}, {"fp16", DType::f16}};
inline constexpr Choice<KvPrecision> kv_precisions[] = {{"same", KvPrecision::same},
                                                        {"fp8_e4m3", KvPrecision::fp8_e4m3}};
inline constexpr Choice<GateKind> gate_kinds[] = {{"softmax", GateKind::softmax}, {"sigmoid", GateKind::sigmoid}};
inline constexpr Choice<PhiKind> phi_kinds[] = {{"mean", PhiKind::mean}, {"mlp", PhiKind::mlp}};
inline constexpr Choice<BackendChoice> backend_choices[] = {
    {"auto", BackendChoice::automatic}, {"host", BackendChoice::host}, {"cuda", BackendChoice::cuda}};
inline constexpr Choice<Mode> mode_names[] = {{"branches", Mode::branches},
                                              {"total", Mode::total},
                                              {"ablation", Mode::ablation},
                                              {"one_hot", Mode::one_hot},
                                              {"launches", Mode::launches}};
inline constexpr Choice<Distribution> distributions[] = {{"equal", Distribution::equal},
                                                         {"uniform", Distribution::uniform},
                                                         {"lognormal", Distribution::lognormal},
                                                         {"zipf", Distribution::zipf},
                                                         {"file", Distribution::file}};
inline constexpr Choice<std::int32_t> forced_branches[] = {{"none", -1}, {"cmp", cmp}, {"sel", sel}, {"win", win}};
inline constexpr Choice<Scope> scopes[] = {{"layer", Scope::layer}, {"attention", Scope::attention}};
inline constexpr Choice<CacheFill> fills[] = {{"prefill", CacheFill::prefill}, {"synthetic", CacheFill::synthetic}};
inline constexpr Choice<CacheLayout> cache_layouts[] = {{"contiguous", CacheLayout::contiguous},
                                                        {"paged", CacheLayout::paged}};
inline constexpr Choice<PageOrder> page_orders[] = {{"sequential", PageOrder::sequential},
                                                    {"shuffled", PageOrder::shuffled}};
inline constexpr Choice<std::int32_t> branch_choices[] = {{"cmp", cmp}, {"sel", sel}, {"win", win}};
inline constexpr Choice<Spans> span_choices[] = {{"contiguous", Spans::contiguous},
                                                 {"mixed", Spans::mixed},
                                                 {"scattered", Spans::scattered},
                                                 {"recorded", Spans::recorded}};
inline const Choice<std::string> implementation_choices[] = {{"fused", "fused"},
                                                             {"sdpa", "sdpa"},
                                                             {"sdpa_packed", "sdpa_packed"},
                                                             {"sdpa_gemm", "sdpa_gemm"},
                                                             {"sdpa_gemm_packed", "sdpa_gemm_packed"},
                                                             {"flash_packed", "flash_packed"},
                                                             {"masked", "masked"},
                                                             {"flash", "flash"},
                                                             {"tiled", "tiled"},
                                                             {"rows", "rows"}};
inline const Choice<std::string> sel_routes[] = {
    {"auto", "auto"}, {"sdpa", "sdpa"}, {"sdpa_gemm", "sdpa_gemm"}, {"masked", "masked"}, {"fused", "fused"}};
inline const Choice<std::string> win_routes[] = {{"auto", "auto"},     {"sdpa", "sdpa"},   {"sdpa_gemm", "sdpa_gemm"},
                                                 {"masked", "masked"}, {"fused", "fused"}, {"flash", "flash"}};
// Without "masked": the compressed branch attends every compressed token, so that its sdpa is dense already.
inline const Choice<std::string> cmp_routes[] = {
    {"auto", "auto"}, {"sdpa", "sdpa"}, {"sdpa_gemm", "sdpa_gemm"}, {"fused", "fused"}, {"flash", "flash"}};

/// Values of the largest tensor of a point: no index and no count of bytes overflows.
inline constexpr double most_values = 1125899906842624.0;  // 2^50
inline double values_per_position(const ModelConfig& m) {
  return static_cast<double>(std::max(m.dim, m.n_heads * std::max(m.d_k, m.d_v)));
}

// The keys by section: visit("section.key", field, allowed values, unit, meaning). The upper bounds keep every index
// and byte count within 64 bits and every per-row size within 32 bits.

inline constexpr Range token_range{1, 1 << 30}, head_range{1, 4096}, head_size_range{1, 4096}, small_range{1, 65536},
    step_range{1, 10'000'000};

template <class ConfigOrConst, class Visitor>
void visit_model_keys(ConfigOrConst& c, Visitor&& visit) {
  visit("model.dim", c.model.dim, Range{1, 1 << 20}, "", "Width of the model: values of x and y for each token.");
  visit("model.n_heads", c.model.n_heads, head_range, "heads", "Query heads, H.");
  visit("model.n_kv_groups", c.model.n_kv_groups, head_range, "groups", "KV groups (KV heads), G; divides n_heads.");
  visit("model.d_k", c.model.d_k, head_size_range, "", "Head size of q and K, Dk; even, because RoPE rotates pairs.");
  visit("model.d_v", c.model.d_v, head_size_range, "", "Head size of V, Dv.");
  visit("model.layers", c.model.layers, Range{1, 1024}, "layers", "Layers, all of the same shape.");
  visit("model.precision", c.model.precision, precisions, "", "Storage type of weights, activations, K and V.");
  visit("model.kv_precision", c.model.kv_precision, kv_precisions, "",
        "What the K/V caches of the selected and window branches hold: values of model.precision, or FP8 (E4M3) with a "
        "scale for each token and KV group. METRICS.md, \"FP8 caches\".");
  visit("model.cmp_precision", c.model.cmp_precision, kv_precisions, "",
        "The same of the compressed tokens, whose scores choose the blocks.");
  visit("model.gate", c.model.gate, gate_kinds, "",
        "Gates of the three branches: one softmax over them, or a sigmoid for each.");
  visit("model.shared_kv", c.model.shared_kv, AnyValue{}, "", "All branches share one projection to K and one to V.");
  visit("model.rope_base", c.model.rope_base, RealRange{1.0, 1e12}, "",
        "Base of the rotary position embedding (RoPE).");
}

template <class ConfigOrConst, class Visitor>
void visit_nsa_keys(ConfigOrConst& c, Visitor&& visit) {
  visit("nsa.l", c.nsa.l, small_range, "tokens", "Length of a compression block, l; at most l_sel.");
  visit("nsa.d", c.nsa.d, small_range, "tokens", "Stride of compression blocks, d; divides l and l_sel.");
  visit("nsa.l_sel", c.nsa.l_sel, small_range, "tokens", "Length of a selection block, l'.");
  visit("nsa.n_sel", c.nsa.n_sel, small_range, "blocks",
        "Selected blocks of each query, n, including those that are always selected.");
  visit("nsa.n_init", c.nsa.n_init, Range{0, 65536}, "blocks", "First blocks, which are always selected.");
  visit("nsa.n_local", c.nsa.n_local, Range{1, 65536}, "blocks",
        "Most recent blocks, which are always selected; the block of the query is one of them.");
  visit("nsa.w", c.nsa.w, token_range, "tokens", "Length of the sliding window, w.");
  visit("nsa.phi", c.phi, phi_kinds, "", "How a block is compressed to one token: by its mean, or by an MLP.");
  visit("nsa.phi_hidden", c.phi_hidden, Range{0, 65536}, "", "Hidden width of the MLP; 0: 2 * d_k.");
}

template <class ConfigOrConst, class Visitor>
void visit_run_keys(ConfigOrConst& c, Visitor&& visit) {
  visit("run.backend", c.run.backend, backend_choices, "",
        "Where the kernels run; auto: CUDA where the build has it and every rank has a GPU, else host.");
  visit("run.context", c.run.context, token_range, "tokens",
        "Tokens before the first decode step; in a prefill, tokens that it runs; else tokens of the sequence. Swept.");
  visit("run.batch", c.run.batch, small_range, "sequences",
        "Sequences that run together; in a mixed step, those that decode. Swept.");
  visit("run.steps", c.run.steps, step_range, "steps",
        "Decode steps of each mode, or repetitions of a prefill or kernel; including the warm-up.");
  visit("run.warmup", c.run.warmup, Range{0, step_range.most}, "steps",
        "First steps of each mode, which no statistic uses; fewer than steps.");
  visit(
      "run.modes", c.run.modes, mode_names, "",
      "What is timed: every stage (branches), the whole step (total), the step without one branch (ablation), the step "
      "with the gates forced to one branch (one_hot), the step by the device's clock and steps without waits "
      "(launches).");
  visit("run.steps_per_graph", c.run.steps_per_graph, step_range, "steps",
        "Decode steps that are launched as one, between two events, where stages are not timed, with the inputs of the "
        "first; a sample is the time of all divided by their number. Divides steps and warmup.");
  visit("run.force_branch", c.run.force_branch, forced_branches, "",
        "The branch whose gate is 1 while the other gates are 0; none: gates as computed. Swept.");
  visit("run.seed", c.run.seed, Range{0, std::numeric_limits<std::int64_t>::max()}, "",
        "Seed of synthetic inputs and weights.");
  visit("run.min_time", c.run.min_time, RealRange{0.0, 86400.0}, "s",
        "Shortest time that each mode measures; its steps are repeated until then.");
  visit("run.min_interval", c.run.min_interval, RealRange{0.0, 1.0}, "of the median",
        "Each mode repeats its steps until the median's 95% interval is at most this wide; 0: no such goal.");
  visit("run.interval_time", c.run.interval_time, RealRange{0.0, 86400.0}, "s",
        "Longest time that a mode measures to reach min_interval; one that does not reach it is NOISY.");
  visit(
      "run.throttle_threshold", c.run.throttle_threshold, RealRange{0.0, 1.0}, "of the largest clock",
      "Mean SM clock of a pass below which it is dropped and measured again, 20 times at most; 0: every pass counts.");
  visit("run.recovery_delay", c.run.recovery_delay, RealRange{0.0, 60.0}, "s",
        "Wait before a pass is measured again, in which the GPU recovers.");
  visit(
      "run.copy_bytes", c.run.copy_bytes, AutoOr{{1 << 16, std::int64_t{1} << 36}}, "bytes",
      "Bytes that each rank copies to measure copy_bandwidth; auto: 128 MiB, or less where ranks share a memory. Where "
      "a cache holds two times as many, its bandwidth is measured.");
  visit("run.deadline", c.run.deadline, RealRange{0.0, 86400.0}, "s",
        "Longest wait for other ranks or for a device before the job ends; 0: no limit.");
  visit(
      "run.overlap", c.run.overlap, RealRange{0.0, 1.0}, "of the queries",
      "How often a query repeats the one before it, and so chooses its blocks; with scope = \"attention\" (q repeats) "
      "or kind = \"kernels\" (the blocks do). METRICS.md, \"Overlap\".");
  visit("run.query_tokens", c.run.query_tokens, Range{1, max_query_tokens}, "tokens",
        "Decode: query tokens of each sequence in a step, its next token and the draft tokens after it. Each has its "
        "own causal limit and selected blocks. Swept.");
  visit("run.accept", c.run.accept, AllOrShare{}, "of the draft tokens",
        "Draft tokens that a step accepts: all, or each with this probability up to the first that is rejected. The "
        "next step begins after them and takes the place of those rejected. METRICS.md, \"Several query tokens\".");
  visit("run.check", c.run.check, AnyValue{}, "", "Recomputes sampled rows in float64 and compares them.");
  visit("run.scope", c.run.scope, scopes, "",
        "layer: the whole layer; attention: q, K, V and gates are given, and no projection runs.");
  visit("run.fill", c.run.fill, fills, "",
        "How decode, or the prefix of a prefill, gets its caches: by a prefill, or filled with synthetic values.");
  visit(
      "run.prefix", c.run.prefix, Range{0, token_range.most}, "tokens",
      "Prefill: tokens of each sequence that the caches hold before it; the context's tokens follow them. Mixed: those "
      "of the sequence that is prefilled.");
  visit("run.prefill_chunk", c.run.prefill_chunk, AutoOr{token_range}, "tokens",
        "Prefill in chunks of so many tokens, each through all layers before the next one; auto: the context as a "
        "whole. Mixed: the tokens that each step prefills, the same ones again and again. Not the chunks of "
        "parallel.kv_chunk_blocks, which ranks own.");
}

template <class ConfigOrConst, class Visitor>
void visit_batch_keys(ConfigOrConst& c, Visitor&& visit) {
  visit("batch.context", c.batch.context, EachSequence{token_range}, "tokens",
        "Tokens of each sequence before the first decode step, in place of run.context and run.batch; empty: by the "
        "distribution.");
  visit("batch.distribution", c.batch.distribution, distributions, "",
        "Lengths of the run.batch sequences: all run.context (equal); drawn, with run.context tokens in the mean "
        "(uniform, lognormal, zipf); or those of the first requests of batch.file (file). Swept. METRICS.md, \"Ragged "
        "batches\".");
  visit("batch.min", c.batch.least, token_range, "tokens", "Shortest length that is drawn.");
  visit("batch.max", c.batch.most, token_range, "tokens", "Longest length that is drawn.");
  visit("batch.sigma", c.batch.sigma, RealRange{0.0, 4.0}, "",
        "Lognormal: standard deviation of the natural logarithm of a length.");
  visit("batch.exponent", c.batch.exponent, RealRange{0.0, 8.0}, "",
        "Zipf: the k-th longest sequence has 1 / k^exponent of the tokens of the longest.");
  visit("batch.seed", c.batch.seed, Range{0, std::numeric_limits<std::int64_t>::max()}, "",
        "Seed of the lengths that are drawn, and of how much of its output a request of batch.file has.");
  visit("batch.file", c.batch.file, AnyValue{}, "",
        "Trace of requests, CSV or JSON, with the tokens of each prompt and output; a sequence has its prompt and a "
        "part of its output.");
}

template <class ConfigOrConst, class Visitor>
void visit_cache_keys(ConfigOrConst& c, Visitor&& visit) {
  visit(
      "cache.layout", c.cache.layout, cache_layouts, "",
      "Rows of a sequence in the caches of selected K and V and of compressed tokens: one after the other, or in pages "
      "that a table names (paged). The rings of the window and of rows that await compression are contiguous. "
      "METRICS.md, \"Paged caches\".");
  visit("cache.page", c.cache.page, token_range, "tokens",
        "Selected K and V of a page; a multiple of l_sel. A page of compressed tokens holds those of a KV chunk.");
  visit("cache.order", c.cache.order, page_orders, "",
        "Where a sequence's pages lie in memory: one after the other, or anywhere (shuffled, from run.seed).");
  visit("cache.shared_prefix", c.cache.shared_prefix, Range{0, token_range.most}, "tokens",
        "First tokens that all sequences have in common. They share the pages that these fill; a page that holds other "
        "tokens too is every sequence's own.");
}

template <class ConfigOrConst, class Visitor>
void visit_parallel_and_route_keys(ConfigOrConst& c, Visitor&& visit) {
  visit(
      "parallel.heads", c.parallel.heads, AutoOr{head_range}, "shards",
      "Shards of KV groups with their heads (tensor parallel); divides n_kv_groups. heads * kv is the number of ranks. "
      "auto: ranks / kv; where kv is auto too, the greatest common divisor of ranks and n_kv_groups.");
  visit("parallel.kv", c.parallel.kv, AutoOr{small_range}, "shards",
        "Shards of each sequence (decode context parallel); auto: ranks / heads.");
  visit("parallel.kv_chunk_blocks", c.parallel.kv_chunk_blocks, AutoOr{{1, 1'000'000}}, "blocks",
        "Selection blocks of a chunk; KV shards own chunks round-robin. auto: 16, in contexts below 128 blocks 8; in a "
        "prefill, a sixteenth of all positions, from 16 to 64.");

  visit("route.cmp", c.route.implementation[cmp], cmp_routes, "",
        "Implementation of compressed attention; auto: the router chooses (ROUTES.md).");
  visit("route.sel", c.route.implementation[sel], sel_routes, "",
        "Implementation of selected attention; auto: the router chooses.");
  visit("route.win", c.route.implementation[win], win_routes, "",
        "Implementation of window attention; auto: the router chooses.");

  visit("runtime.fa2_min_len_win", c.runtime.fa2_min_len_win, AutoOr{{-1, 1 << 30}}, "K/V rows of a query",
        "Window attention runs as flash from this length on; auto: the default table decides; -1: never.");
  visit("runtime.fa2_min_len_cmp", c.runtime.fa2_min_len_cmp, AutoOr{{-1, 1 << 30}}, "K/V rows of a query",
        "Compressed attention runs as flash from this length on; auto: the default table decides; -1: never.");
  visit("runtime.sel_triton_min_L", c.runtime.sel_triton_min_l, AutoOr{{-1, 1 << 30}}, "K/V rows of a query",
        "Selected attention runs as sdpa below this length; auto: the default table decides; -1: at every length.");
}

template <class ConfigOrConst, class Visitor>
void visit_kernels_keys(ConfigOrConst& c, Visitor&& visit) {
  visit("kernels.branch", c.kernels.branch, branch_choices, "", "Branch of attention. Swept.");
  visit("kernels.rows", c.kernels.rows, Range{0, 1 << 24}, "rows",
        "Query rows at the end of the context, N; 0: all positions. Swept.");
  visit("kernels.heads", c.kernels.heads, head_range, "heads", "Query heads that share one K and V, H. Swept.");
  visit("kernels.head_size", c.kernels.head_size, head_size_range, "", "Head size, Dk = Dv. Swept.");
  visit("kernels.blocks", c.kernels.blocks, small_range, "blocks", "Selected blocks of each row, n; only sel. Swept.");
  visit("kernels.spans", c.kernels.spans, span_choices, "",
        "Positions of a row's selected blocks: n neighbours (contiguous), n/2 neighbours and the rest drawn at random "
        "(mixed), all drawn at random (scattered), or those of input.selection (recorded); only sel. Swept.");
  visit("kernels.cold", c.kernels.cold, AnyValue{}, "", "No execution finds its K and V in a cache.");
  visit("kernels.implementations", c.kernels.implementations, implementation_choices, "",
        "Implementations that are measured (METRICS.md, \"Kernels beside one another\").");
}

/// Calls visit("section.key", field, allowed values, unit, meaning) for every key, in the order of the input file.
template <class ConfigOrConst, class Visitor>
void visit_documented_keys(ConfigOrConst& c, Visitor&& visit) {
  visit(
      "task.kind", c.kind, task_kinds, "",
      "What the run does: decode steps, prefill, steps of decode rows and a prefill chunk together (mixed), kernels of "
      "one branch measured side by side, or a search for planted keys (needle). The only key without a default.");
  visit_model_keys(c, visit);
  visit_nsa_keys(c, visit);
  visit_run_keys(c, visit);
  visit_batch_keys(c, visit);
  visit_cache_keys(c, visit);
  visit_parallel_and_route_keys(c, visit);
  visit("needle.depths", c.needle.depths, RealRange{0.0, 1.0}, "of the context", "Positions of the planted keys.");
  visit_kernels_keys(c, visit);
  visit("input.file", c.input_file, AnyValue{}, "",
        "HDF5 file with x and weights (SCHEMA.md, \"Tensors\"); empty: synthetic values.");
  visit("input.selection", c.input_selection, AnyValue{}, "",
        "HDF5 file with the selected blocks of each query (SCHEMA.md, \"Selections\"), which are attended as they are; "
        "empty: ranking selects.");

  visit("output.file", c.output.file, AnyValue{}, "", "Result file, HDF5 (SCHEMA.md).");
  visit("output.tensors", c.output.tensors, AnyValue{}, "", "The result file also holds the tensors of the run.");
  visit("output.selection", c.output.selection, AnyValue{}, "",
        "The result file also holds the selected blocks of each query, for input.selection of another run.");
  visit("output.csv", c.output.csv, AnyValue{}, "", "CSV file with the columns of nsa-vibe's benchmark; empty: none.");
}

/// Calls visit("section.key", field, allowed values) for every key.
template <class ConfigOrConst, class Visitor>
void visit_keys(ConfigOrConst& c, Visitor&& visit) {
  visit_documented_keys(c, [&](const char* key, auto& field, const auto& spec, const char* /*unit*/,
                               const char* /*meaning*/) { visit(key, field, spec); });
}

/// The name of a value in the input.
template <class T, std::size_t n>
std::string name_of_choice(const T& value, const Choice<T> (&choices)[n]) {
  for (const Choice<T>& choice : choices) {
    if (choice.value == value) return choice.name;
  }
  return "?";
}

/// An error in the input, and where the value was set.
struct Problem {
  SourcePosition where;  ///< empty path: a default, or no single position
  std::string what;
};

/// "in.toml:3:1: ", "--set run.seed=x: ", or "" for no position.
std::string location_text(const SourcePosition& at);

/// Throws one UserError that lists all problems: in file order, then those of the command line, then those without a
/// position. Returns if there are none.
void throw_problems(std::vector<Problem> problems);

}  // namespace nsa
