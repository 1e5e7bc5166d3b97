#pragma once
// Every key of the input, once: its name, its field and what it may hold. Reading, unknown-key suggestions,
// range checks, parameters and to_toml are visitors of this list.

#include <cstdint>
#include <limits>
#include <string>

#include "nsa/config/config.hpp"

namespace nsa {

/// A word of the input and what it means.
template <class T>
struct Choice {
  const char* name;
  T value;
};

struct Any {};  ///< bool, string: whatever it is

struct Range {
  std::int64_t least = 1, most = std::numeric_limits<std::int32_t>::max();
};

struct AutoOr {  ///< "auto", stored as 0, or an integer
  Range range;
};

struct RealRange {
  double least, most;
};

inline constexpr Choice<TaskKind> task_kinds[] = {{"decode", TaskKind::decode},
                                                  {"prefill", TaskKind::prefill},
                                                  {"kernels", TaskKind::kernels},
                                                  {"needle", TaskKind::needle}};
inline constexpr Choice<DType> precisions[] = {{"fp32", DType::f32}, {"bf16", DType::bf16}, {"fp16", DType::f16}};
inline constexpr Choice<GateKind> gate_kinds[] = {{"softmax", GateKind::softmax}, {"sigmoid", GateKind::sigmoid}};
inline constexpr Choice<PhiKind> phi_kinds[] = {{"mean", PhiKind::mean}, {"mlp", PhiKind::mlp}};
inline constexpr Choice<BackendChoice> backend_choices[] = {
    {"auto", BackendChoice::automatic}, {"host", BackendChoice::host}, {"cuda", BackendChoice::cuda}};
inline constexpr Choice<Mode> mode_names[] = {
    {"branches", Mode::branches}, {"total", Mode::total}, {"ablation", Mode::ablation}, {"one_hot", Mode::one_hot}};
inline constexpr Choice<std::int32_t> forced_branches[] = {{"none", -1}, {"cmp", cmp}, {"sel", sel}, {"win", win}};
inline constexpr Choice<Scope> scopes[] = {{"layer", Scope::layer}, {"attention", Scope::attention}};
inline constexpr Choice<CacheFill> fills[] = {{"prefill", CacheFill::prefill}, {"synthetic", CacheFill::synthetic}};
inline constexpr Choice<std::int32_t> branch_choices[] = {{"cmp", cmp}, {"sel", sel}, {"win", win}};
inline constexpr Choice<Spans> span_choices[] = {
    {"contiguous", Spans::contiguous}, {"mixed", Spans::mixed}, {"scattered", Spans::scattered}};
inline const Choice<std::string> implementation_choices[] = {{"fused", "fused"},
                                                             {"sdpa", "sdpa"},
                                                             {"sdpa_packed", "sdpa_packed"},
                                                             {"flash_packed", "flash_packed"},
                                                             {"masked", "masked"},
                                                             {"flash", "flash"},
                                                             {"tiled", "tiled"},
                                                             {"rows", "rows"}};
inline const Choice<std::string> sel_routes[] = {
    {"auto", "auto"}, {"sdpa", "sdpa"}, {"masked", "masked"}, {"fused", "fused"}};
inline const Choice<std::string> win_routes[] = {
    {"auto", "auto"}, {"sdpa", "sdpa"}, {"masked", "masked"}, {"fused", "fused"}, {"flash", "flash"}};
// No masked one: the compressed branch attends every token it has, so that sdpa is dense already.
inline const Choice<std::string> cmp_routes[] = {
    {"auto", "auto"}, {"sdpa", "sdpa"}, {"fused", "fused"}, {"flash", "flash"}};

/// Calls visit("section.key", field, what it may hold) for every key, in the order of the input file. The upper
/// bounds keep every index and byte count inside 64 bits and every per-row size inside 32.
template <class ConfigOrConst, class Visitor>
void visit_keys(ConfigOrConst& c, Visitor&& visit) {
  constexpr std::int64_t million = 1'000'000;
  constexpr Range tokens{1, 1 << 30}, heads{1, 4096}, head_size{1, 4096}, small{1, 65536};

  visit("task.kind", c.kind, task_kinds);

  visit("model.dim", c.model.dim, Range{1, 1 << 20});
  visit("model.n_heads", c.model.n_heads, heads);
  visit("model.n_kv_groups", c.model.n_kv_groups, heads);
  visit("model.d_k", c.model.d_k, head_size);
  visit("model.d_v", c.model.d_v, head_size);
  visit("model.layers", c.model.layers, Range{1, 1024});
  visit("model.precision", c.model.precision, precisions);
  visit("model.gate", c.model.gate, gate_kinds);
  visit("model.shared_kv", c.model.shared_kv, Any{});
  visit("model.rope_base", c.model.rope_base, RealRange{1.0, 1e12});

  visit("nsa.l", c.nsa.l, small);
  visit("nsa.d", c.nsa.d, small);
  visit("nsa.l_sel", c.nsa.l_sel, small);
  visit("nsa.n_sel", c.nsa.n_sel, small);
  visit("nsa.n_init", c.nsa.n_init, Range{0, 65536});
  visit("nsa.n_local", c.nsa.n_local, Range{1, 65536});  // the query's own block is always chosen
  visit("nsa.w", c.nsa.w, tokens);
  visit("nsa.phi", c.phi, phi_kinds);
  visit("nsa.phi_hidden", c.phi_hidden, Range{0, 65536});

  visit("run.backend", c.run.backend, backend_choices);
  visit("run.context", c.run.context, tokens);
  visit("run.batch", c.run.batch, small);
  visit("run.steps", c.run.steps, Range{1, 10 * million});
  visit("run.warmup", c.run.warmup, Range{0, 10 * million});
  visit("run.modes", c.run.modes, mode_names);
  visit("run.force_branch", c.run.force_branch, forced_branches);
  visit("run.seed", c.run.seed, Range{0, std::numeric_limits<std::int64_t>::max()});
  visit("run.min_time", c.run.min_time, RealRange{0.0, 86400.0});
  visit("run.deadline", c.run.deadline, RealRange{0.0, 86400.0});
  visit("run.check", c.run.check, Any{});
  visit("run.scope", c.run.scope, scopes);
  visit("run.fill", c.run.fill, fills);

  visit("parallel.heads", c.parallel.heads, AutoOr{heads});
  visit("parallel.kv", c.parallel.kv, AutoOr{small});
  visit("parallel.kv_chunk_blocks", c.parallel.kv_chunk_blocks, Range{1, million});

  visit("route.cmp", c.route.implementation[cmp], cmp_routes);
  visit("route.sel", c.route.implementation[sel], sel_routes);
  visit("route.win", c.route.implementation[win], win_routes);

  visit("runtime.fa2_min_len_win", c.runtime.fa2_min_len_win, AutoOr{{-1, 1 << 30}});
  visit("runtime.fa2_min_len_cmp", c.runtime.fa2_min_len_cmp, AutoOr{{-1, 1 << 30}});
  visit("runtime.sel_triton_min_L", c.runtime.sel_triton_min_l, AutoOr{{-1, 1 << 30}});

  visit("needle.depths", c.needle.depths, RealRange{0.0, 1.0});

  visit("kernels.branch", c.kernels.branch, branch_choices);
  visit("kernels.rows", c.kernels.rows, Range{0, 1 << 24});
  visit("kernels.heads", c.kernels.heads, heads);
  visit("kernels.head_size", c.kernels.head_size, head_size);
  visit("kernels.blocks", c.kernels.blocks, small);
  visit("kernels.spans", c.kernels.spans, span_choices);
  visit("kernels.cold", c.kernels.cold, Any{});
  visit("kernels.implementations", c.kernels.implementations, implementation_choices);

  visit("input.file", c.input_file, Any{});

  visit("output.file", c.output.file, Any{});
  visit("output.tensors", c.output.tensors, Any{});
  visit("output.csv", c.output.csv, Any{});
}

/// The word for a value.
template <class T, std::size_t n>
std::string name_of_choice(const T& value, const Choice<T> (&choices)[n]) {
  for (const Choice<T>& choice : choices) {
    if (choice.value == value) return choice.name;
  }
  return "?";
}

/// Something wrong with the input, and where it was set.
struct Problem {
  SourcePosition where;  ///< empty path: a default, or no single place
  std::string what;
};

/// "in.toml:3:1: ", "--set run.seed=x: ", or "" for no place.
std::string place_text(const SourcePosition& at);

/// One UserError for all of them: file order, then the command line, then what has no place. Returns if there are none.
void throw_problems(std::vector<Problem> problems);

}  // namespace nsa
