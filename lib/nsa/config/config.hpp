#pragma once
// The input of a run: one TOML file; every key but task.kind has a default. docs/INPUT.md describes every key. Units:
// tokens, seconds, bytes.

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "kernels/interface/kernel_table.hpp"

namespace nsa {

enum class TaskKind { decode, prefill, mixed, kernels, needle };
enum class Scope { layer, attention };        ///< attention: q, k, v and gates are given
enum class CacheFill { prefill, synthetic };  ///< synthetic: caches filled directly
enum class BackendChoice { automatic, host, cuda };
enum class Spans { contiguous, mixed, scattered, recorded };        ///< positions of a row's selected blocks
enum class Distribution { equal, uniform, lognormal, zipf, file };  ///< of the lengths of a batch
enum class CacheLayout { contiguous, paged };
enum class PageOrder { sequential, shuffled };  ///< of a sequence's pages in memory
enum class Mode { branches, total, ablation, one_hot, launches };

struct ModelConfig {
  std::int64_t dim = 256, n_heads = 4, n_kv_groups = 2, d_k = 64, d_v = 64, layers = 1;
  DType precision = DType::bf16;
  KvPrecision kv_precision = KvPrecision::same, cmp_precision = KvPrecision::same;
  GateKind gate = GateKind::softmax;
  bool shared_kv = false;
  double rope_base = 10000.0;
};

struct RunConfig {
  BackendChoice backend = BackendChoice::automatic;
  std::vector<std::int64_t> context = {128, 256, 512, 1024};  ///< swept
  std::vector<std::int64_t> batch = {1};                      ///< swept
  std::int64_t steps = 32;  ///< decode steps, or repetitions of a prefill; including the warm-up
  std::int64_t warmup = 8;
  std::vector<Mode> modes = {Mode::branches, Mode::total};
  std::int64_t steps_per_graph = 1;               ///< decode steps between two events where stages are not timed
  std::vector<std::int32_t> force_branch = {-1};  ///< swept; -1 none, else a Branch
  std::int64_t seed = 1;
  double min_time = 0.0;        ///< seconds that each mode measures at least, by repeating its steps
  double min_interval = 0.0;    ///< the 95% interval of the median, as a share of it, until which each mode repeats
  double interval_time = 60.0;  ///< seconds after which a mode does not repeat for min_interval
  double throttle_threshold = 0.75;  ///< mean SM clock of a pass, of the largest, below which it is measured again
  double recovery_delay = 0.05;      ///< seconds before that
  std::int64_t copy_bytes = 0;       ///< of the copy that measures the copy bandwidth; 0: auto
  double deadline = 300.0;  ///< seconds that an operation between ranks or a wait for a device may take; 0: no limit
  double overlap = 0.0;     ///< how often a query repeats the one before it
  std::vector<std::int64_t> query_tokens = {1};  ///< swept; decode: of a sequence in a step
  double accept = 1.0;  ///< probability that a step accepts a draft token, up to the first that it rejects
  bool check = true;
  Scope scope = Scope::layer;
  CacheFill fill = CacheFill::prefill;
  std::int64_t prefix = 0;         ///< prefill, or the chunk of a mixed step: tokens that the caches hold before it
  std::int64_t prefill_chunk = 0;  ///< tokens of a prefill chunk; 0: auto, the whole context
};

/// A request of a trace, tokens.
struct Request {
  std::int64_t prompt = 0, output = 0;
};

struct BatchConfig {                  ///< decode: sequences of different lengths
  std::vector<std::int64_t> context;  ///< tokens of each sequence; empty: by the distribution
  std::vector<Distribution> distribution = {Distribution::equal};  ///< swept
  std::int64_t least = 1, most = 1 << 30;                          ///< tokens of a sequence
  double sigma = 1.0;     ///< lognormal: standard deviation of the logarithm of a length
  double exponent = 1.0;  ///< zipf: the k-th longest sequence has 1 / k^exponent of the longest
  std::int64_t seed = 1;
  std::string file;
  std::vector<Request> requests;  ///< what `file` holds, once it is read (config/lengths.hpp)
};

/// How the caches that grow lie in memory (model/pages.hpp).
struct CacheConfig {
  CacheLayout layout = CacheLayout::contiguous;
  std::int64_t page = 64;  ///< tokens
  PageOrder order = PageOrder::sequential;
  std::int64_t shared_prefix = 0;  ///< first tokens that all sequences have in common

  bool paged() const { return layout == CacheLayout::paged; }
};

struct ParallelConfig {
  std::int64_t heads = 0, kv = 0;    ///< 0: auto
  std::int64_t kv_chunk_blocks = 0;  ///< 0: auto, kv_chunk_blocks() of a point
};

struct RouteConfig {
  std::string implementation[branches] = {"auto", "auto", "auto"};
};

/// nsa-vibe's thresholds, in K/V rows that one query attends: from this length on `flash` runs for win and cmp, a
/// custom kernel for sel. 0: auto, the default table decides; -1: never.
struct RuntimeConfig {
  std::int64_t fa2_min_len_win = 0, fa2_min_len_cmp = 0, sel_triton_min_l = 0;
};

struct NeedleConfig {
  std::vector<double> depths = {0.0, 0.25, 0.5, 0.75, 1.0};  ///< fraction of the context
};

struct KernelsConfig {  ///< kind = "kernels"; every list but `implementations` is swept
  std::vector<std::int32_t> branch = {sel};
  std::vector<std::int64_t> rows = {256};      ///< query rows N at the end of the context; 0: every position of it
  std::vector<std::int64_t> heads = {4};       ///< query heads that share one K and V
  std::vector<std::int64_t> head_size = {64};  ///< Dk = Dv
  std::vector<std::int64_t> blocks = {16};     ///< n, selected blocks of each row
  std::vector<Spans> spans = {Spans::scattered};
  bool cold = true;  ///< no execution finds its K and V in a cache
  std::vector<std::string> implementations = {"fused", "sdpa", "sdpa_packed"};
};

struct OutputConfig {
  std::string file = "result.h5";
  bool tensors = false, selection = false;
  std::string csv;
};

/// Where a key was set. line 0: on the command line; `path` is then the whole "--set key=value".
struct SourcePosition {
  std::string path;
  std::int64_t line = 0, column = 0;
};

struct Config {
  TaskKind kind = TaskKind::decode;
  ModelConfig model;
  BlockRules nsa;
  PhiKind phi = PhiKind::mean;
  std::int64_t phi_hidden = 0;  ///< 0: 2 * d_k
  RunConfig run;
  BatchConfig batch;
  CacheConfig cache;
  ParallelConfig parallel;
  RouteConfig route;
  RuntimeConfig runtime;
  NeedleConfig needle;
  KernelsConfig kernels;
  std::string input_file;
  std::string input_selection;  ///< a file with the selected blocks, which are attended; empty: ranking selects
  OutputConfig output;
  /// Whether a step decodes: alone, or beside a prefill chunk.
  bool decodes() const { return kind == TaskKind::decode || kind == TaskKind::mixed; }
  /// Tokens that every sequence of the batch has before run.context.
  std::int64_t prefix_of_batch() const { return kind == TaskKind::prefill ? run.prefix : 0; }
  /// Whether a point has a recorded pass before it is measured.
  bool records() const { return run.check || output.tensors || output.selection; }
  std::map<std::string, SourcePosition>
      origin;  ///< "model.d_k" -> where it was set; without keys left at their default
};

/// The shape that a point of kind = "kernels" measures.
struct KernelShape {
  Branch branch = sel;
  std::int64_t rows = 0, heads = 1, head_size = 64, blocks = 1;
  Spans spans = Spans::scattered;
};

/// One point of the sweep.
struct Point {
  std::int64_t context = 0, batch = 1;  ///< context of a ragged batch: the mean of its lengths
  std::int32_t force_branch = -1;
  KernelShape kernel = {};  ///< kind = "kernels"
  Distribution distribution = Distribution::equal;
  std::vector<std::int64_t> lengths = {};  ///< [batch] of a ragged batch; empty: every sequence has `context` tokens
  std::int64_t query_tokens = 1;           ///< of a sequence in a decode step

  bool ragged() const { return !lengths.empty(); }
  /// Tokens of sequence b before the first decode step.
  std::int64_t length(std::int64_t b) const { return ragged() ? lengths[static_cast<std::size_t>(b)] : context; }
  std::int64_t longest() const;
  std::int64_t shortest() const;
};

/// Reads `text` (named `path` in messages) after applying `overrides` ("section.key=value", TOML values).
/// Throws UserError "path:line:column: ..." for a syntax error, unknown keys (the message names the nearest known one)
/// and wrong types, all in one message. Does not check constraints.
Config parse_config(std::string_view text, const std::string& path, const std::vector<std::string>& overrides);

/// Throws one UserError that lists every violated constraint: position in the input, key, value, rule.
void validate(const Config& config);

/// The points, in order. Throws UserError where a trace has too few requests.
std::vector<Point> sweep(const Config& config);

/// Selection blocks of a KV chunk at the point: parallel.kv_chunk_blocks, or what "auto" means. It does not depend on
/// the number of ranks, since the compressed softmax is summed chunk by chunk: every layout forms the same bits.
std::int64_t kv_chunk_blocks(const Config& config, const Point& point);

/// A parameter of a point as the result file holds it: "model.d_k" -> value. Stable order, every key.
using Parameter = std::pair<std::string, std::variant<std::int64_t, double, std::string>>;
std::vector<Parameter> parameters(const Config& config, const Point& point);

/// A key of the input and its value in TOML: "run.context", "[1024, 4096]". Stable order, every key.
using Setting = std::pair<std::string, std::string>;
std::vector<Setting> settings(const Config& config);

/// The config as TOML that parses back to itself.
std::string to_toml(const Config& config);

}  // namespace nsa
