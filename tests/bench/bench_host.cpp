// Speed of the host backend: a STREAM-like copy, decode attention at 64K context and prefill at 16K, by stage, with the
// bytes read. Prints one JSON object per line; scripts/bench/bench_host.py compares it with torch and prints the
// ratios.
//   usage: bench_host [threads]            the shapes of the script
//          bench_host threads shapes [row] decode of other head counts, head sizes and blocks, bf16; a row of them

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/host/runtime/host.hpp"
#include "kernels/interface/buffer.hpp"
#include "kernels/shared/random.hpp"

using namespace nsa;

namespace {

double seconds_of(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double median(std::vector<double> samples) {
  std::nth_element(samples.begin(), samples.begin() + samples.size() / 2, samples.end());
  return samples[samples.size() / 2];
}

/// Bytes read and written per second by `to[i] = from[i]` on arrays much larger than the caches; best of five.
double copy_rate() {
  const std::int64_t n = std::int64_t{1} << 26;
  MemoryAccount account;
  Buffer from(host_device(), account, MemoryKind::workspace, n * 4),
      to(host_device(), account, MemoryKind::workspace, n * 4);
  double best = 1e9;
  for (int i = 0; i < 5; ++i) {
    best = std::min(best, seconds_of([&] {
                      const float* a = from.as<float>();
                      float* b = to.as<float>();
#pragma omp parallel for
                      for (std::int64_t k = 0; k < n; ++k) b[k] = a[k];
                    }));
  }
  return 2.0 * n * 4 / best;
}

struct Case {
  std::int32_t batch, heads, groups, width;
  DType dtype;
  std::int32_t d_v = width, l_sel = 64, n_sel = 16;
};

/// The caches and buffers of one attention layer. Steps rotate over `copies` of the compressed and window caches, so
/// that they are in memory and not in the last cache level; the selected blocks change with q.
class Bench {
 public:
  Bench(const Case& c, std::int64_t positions, std::int32_t tokens, int copies) : positions_(positions) {
    shape_.groups = c.groups;
    shape_.heads_per_group = c.heads / c.groups;
    shape_.d_k = c.width, shape_.d_v = c.d_v;
    shape_.dtype = c.dtype;
    shape_.rules.l_sel = c.l_sel, shape_.rules.n_sel = c.n_sel;
    tile_ = {0, c.batch, tokens, &position_, positions};
    const std::int64_t rows = tile_.rows();
    const std::int64_t n = compressed_tokens(shape_.rules, positions - 1);
    const std::int32_t d_k = shape_.d_k, d_v = shape_.d_v;
    sel_ = {cache("sel.k", d_k, positions), cache("sel.v", d_v, positions)};
    for (int i = 0; i < copies; ++i) {
      cmp_.push_back({cache("cmp.k", d_k, n), cache("cmp.v", d_v, n)});
      win_.push_back(tokens > 1 ? sel_
                                : KvCaches{cache("win.k", d_k, positions, shape_.rules.w),
                                           cache("win.v", d_v, positions, shape_.rules.w)});
    }
    for (int i = 0; i < queries; ++i)
      q_.push_back(filled(rows * c.heads * c.width, std::string(1, static_cast<char>('a' + i))));
    partials_ = make(partial_floats(shape_, rows) * 4);
    lse_ = make(shape_.lse.buckets * rows * c.heads * 8);
    scores_ = make(host_kernels().score_bytes(shape_, tile_, n));
    scratch_ = make(host_kernels().scratch_bytes(shape_, tile_, {}));
    selected_ = make(rows * c.groups * shape_.rules.n_sel * 4);
    reads_ = make(branches * c.batch * c.groups * 8);
    gate_ = make(rows * c.groups * branches * 4);
    o_ = make(rows * c.heads * c.d_v * size_of(c.dtype));
    std::fill_n(gate_->as<float>(), rows * c.groups * branches, 1.0f / 3.0f);
    std::fill_n(reads_->as<std::int64_t>(), branches * c.batch * c.groups, 0);
  }

  /// Runs the stages at `position` on cache copy `iteration` modulo copies; adds each stage's seconds.
  void step(std::int64_t position, int iteration, double seconds[5]) {
    position_ = position;
    iteration_ = iteration;
    const KernelTable& table = host_kernels();
    seconds[0] += seconds_of([&] { attend(cmp, cmp_[iteration % cmp_.size()]); });
    seconds[1] += seconds_of([&] { rank(); });
    seconds[2] += seconds_of([&] { attend(sel, sel_); });
    seconds[3] += seconds_of([&] { attend(win, win_[iteration % win_.size()]); });
    seconds[4] += seconds_of([&] {
      CombineArgs args;
      args.shape = shape_;
      args.tile = tile_;
      args.partials = partials_->as<float>();
      args.gate = gate_->as<float>();
      args.o = o_->data();
      table.combine(args, nullptr);
    });
  }

  /// K and V bytes of a branch that the kernels have counted as read so far.
  std::int64_t bytes(int branch) const {
    std::int64_t tokens = 0;
    const std::int64_t planes = std::int64_t{tile_.batches} * shape_.groups;
    for (std::int64_t i = 0; i < planes; ++i) tokens += reads_->as<std::int64_t>()[branch * planes + i];
    return tokens * (shape_.d_k + shape_.d_v) * static_cast<std::int64_t>(size_of(shape_.dtype));
  }

 private:
  static constexpr int queries = 8;
  using SharedBuffer = std::shared_ptr<Buffer>;
  struct Cache {
    SharedBuffer buffer;
    KvView view;
  };
  struct KvCaches {
    Cache k, v;
  };

  SharedBuffer make(std::int64_t bytes) {
    return std::make_shared<Buffer>(host_device(), account_, MemoryKind::workspace, static_cast<std::size_t>(bytes));
  }

  Cache cache(const std::string& name, std::int32_t width, std::int64_t rows, std::int64_t ring = 0) {
    RowMap map;
    map.ring = ring;
    const std::int64_t memory_rows = ring > 0 ? ring : rows;
    Cache result{
        make(tile_.batches * shape_.groups * memory_rows * width * static_cast<std::int64_t>(size_of(shape_.dtype))),
        {}};
    result.view = {result.buffer->data(), map, memory_rows * width, 0, width};
    host_kernels().fill_rows(
        {shape_.dtype, result.view, tile_.batches, shape_.groups, 0, 0, rows, tensor_key(1, name.c_str()), 1.0f},
        nullptr);
    return result;
  }

  SharedBuffer filled(std::int64_t count, const std::string& name) {
    SharedBuffer buffer = make(count * static_cast<std::int64_t>(size_of(shape_.dtype)));
    const KvView rows{buffer->data(), {}, count, 0, shape_.d_k};
    host_kernels().fill_rows({shape_.dtype, rows, 1, 1, 0, 0, count / shape_.d_k, tensor_key(1, name.c_str()), 1.0f},
                             nullptr);
    return buffer;
  }

  void attend(Branch branch, const KvCaches& kv) {
    AttendArgs args;
    args.shape = shape_;
    args.tile = tile_;
    args.q = q_[iteration_ % queries]->data();
    args.k = kv.k.view;
    args.v = kv.v.view;
    args.out = partials_at(partials_->as<float>(), shape_, tile_.rows(), branch);
    args.reads = reads_->as<std::int64_t>() + branch * tile_.batches * shape_.groups;
    args.selected = selected_->as<std::int32_t>();
    args.lse = lse_->as<float>();
    args.scores = scores_->data();
    args.scratch = scratch_->data();
    args.scratch_bytes = scratch_->bytes();
    host_kernels().attend[branch].front().run(args, nullptr);
  }

  void rank() {
    RankArgs args;
    args.shape = shape_;
    args.tile = tile_;
    args.scores = scores_->data();
    args.lse = lse_->as<float>();
    args.selected = selected_->as<std::int32_t>();
    args.scratch = scratch_->data();
    args.scratch_bytes = scratch_->bytes();
    host_kernels().rank(args, nullptr);
  }

  LayerShape shape_;
  QueryTile tile_;
  std::int64_t position_ = 0, positions_;
  int iteration_ = 0;
  MemoryAccount account_;
  KvCaches sel_;
  std::vector<KvCaches> cmp_, win_;
  std::vector<SharedBuffer> q_;
  SharedBuffer partials_, lse_, scores_, scratch_, selected_, reads_, gate_, o_;
};

constexpr const char* stage_names[5] = {"attend_cmp", "rank", "attend_sel", "attend_win", "combine"};

void print_case(const char* what, const Case& c, std::int64_t context) {
  std::printf(
      "{\"what\": \"%s\", \"dtype\": \"%s\", \"batch\": %d, \"heads\": %d, \"groups\": %d, \"d\": %d, \"context\": "
      "%lld, \"d_v\": %d, \"l_sel\": %d, \"n_sel\": %d",
      what, name_of(c.dtype), c.batch, c.heads, c.groups, c.width, static_cast<long long>(context), c.d_v, c.l_sel,
      c.n_sel);
}

void print_stages(const double seconds[5]) {
  for (int i = 0; i < 5; ++i) std::printf(", \"%s\": %.3e", stage_names[i], seconds[i]);
}

/// Medians of each stage and of their sum over the steps after a warm-up.
void decode(const Case& c, std::int64_t context) {
  const std::int64_t bytes =
      (context / 16 + 512) * (c.width + c.d_v) * c.groups * c.batch * static_cast<std::int64_t>(size_of(c.dtype));
  const int copies = static_cast<int>(std::clamp<std::int64_t>((std::int64_t{192} << 20) / bytes, 1, 32));
  Bench bench(c, context, 1, copies);
  std::vector<double> samples[6];
  std::int64_t before = 0, after = 0;
  const int steps = 104, warmup = 4;
  for (int i = 0; i < steps; ++i) {
    double seconds[5] = {};
    if (i == warmup) before = bench.bytes(cmp) + bench.bytes(sel) + bench.bytes(win);
    bench.step(context - 1, i, seconds);
    if (i < warmup) continue;
    samples[5].push_back(0);
    for (int s = 0; s < 5; ++s) {
      samples[s].push_back(seconds[s]);
      samples[5].back() += seconds[s];
    }
  }
  after = bench.bytes(cmp) + bench.bytes(sel) + bench.bytes(win);
  double medians[5];
  for (int s = 0; s < 5; ++s) medians[s] = median(samples[s]);
  const double best = *std::min_element(samples[5].begin(), samples[5].end());
  const double total = median(samples[5]), read = static_cast<double>(after - before) / (steps - warmup);
  print_case("decode", c, context);
  print_stages(medians);
  std::printf(", \"seconds\": %.3e, \"best\": %.3e, \"bytes\": %.0f, \"bytes_per_second\": %.4e}\n", total, best, read,
              read / total);
  std::fflush(stdout);
}

void prefill(const Case& c, std::int64_t context) {
  const std::int32_t tokens = 256;
  Bench bench(c, context, tokens, 1);
  double seconds[5] = {}, total = 0;
  for (std::int64_t t = 0; t < context; t += tokens) bench.step(t, static_cast<int>(t / tokens), seconds);
  for (const double s : seconds) total += s;
  print_case("prefill", c, context);
  print_stages(seconds);
  std::printf(", \"seconds\": %.3e}\n", total);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) set_host_threads(std::atoi(argv[1]));
  const DeviceInfo info = host_device().info();
  std::printf("{\"what\": \"machine\", \"cpu\": \"%s\", \"simd\": \"%s\", \"threads\": %d}\n", info.name.c_str(),
              info.architecture.c_str(), info.units);
  std::printf("{\"what\": \"copy\", \"bytes_per_second\": %.4e}\n", copy_rate());
  if (argc > 2 && std::string(argv[2]) == "shapes") {
    constexpr DType bf16 = DType::bf16;
    const std::vector<Case> rows = {Case{1, 64, 4, 128, bf16},
                                    Case{1, 64, 4, 192, bf16, 128},
                                    Case{1, 64, 4, 16, bf16},
                                    Case{1, 64, 4, 80, bf16},
                                    Case{1, 64, 4, 96, bf16},
                                    Case{1, 64, 4, 160, bf16},
                                    Case{1, 64, 4, 256, bf16},
                                    Case{1, 16, 8, 256, bf16},
                                    Case{1, 32, 32, 96, bf16},
                                    Case{1, 32, 32, 128, bf16},
                                    Case{1, 40, 8, 128, bf16},
                                    Case{1, 128, 4, 128, bf16},
                                    Case{1, 64, 1, 128, bf16},
                                    Case{1, 128, 1, 128, bf16},
                                    Case{1, 64, 4, 128, bf16, 128, 128},
                                    Case{1, 64, 4, 128, bf16, 128, 64, 32}};
    for (std::size_t row = 0; row < rows.size(); ++row)
      if (argc < 4 || row == static_cast<std::size_t>(std::atoi(argv[3]))) decode(rows[row], 65536);
    return 0;
  }
  for (const DType dtype : {DType::f32, DType::bf16})
    for (const Case c :
         {Case{1, 8, 2, 64, dtype}, Case{4, 8, 2, 64, dtype}, Case{1, 64, 4, 128, dtype}, Case{4, 64, 4, 128, dtype}})
      decode(c, 65536);
  for (const DType dtype : {DType::f32, DType::bf16}) prefill({1, 8, 2, 64, dtype}, 16384);
}
