#include "nsa/tasks/kernel_bench.hpp"

#include <algorithm>
#include <cmath>
#include <span>
#include <thread>

#include "kernels/diagnostics/error.hpp"
#include "kernels/shared/random.hpp"
#include "nsa/model/selections.hpp"
#include "nsa/model/weights.hpp"
#include "nsa/results/error_bound.hpp"
#include "nsa/verify/shared_blocks.hpp"

namespace nsa {
namespace {

// More than the last-level cache of any supported device: the size of all copies of K and V together.
constexpr std::int64_t cold_bytes = std::int64_t{128} << 20;
constexpr std::int64_t max_copies = 64;

const AttendKernel* find_kernel(const KernelTable& kernels, Branch branch, const std::string& name) {
  for (const AttendKernel& kernel : kernels.attend[branch])
    if (kernel.name == name) return &kernel;
  return nullptr;
}

constexpr std::string_view packed_suffix = "_packed";

/// Dense attention over packed K and V is a window that holds them all. The tiled kernel is `flash`, else `fused`.
const AttendKernel* packed_kernel(const KernelTable& kernels, const std::string& label) {
  const AttendKernel* kernel = find_kernel(kernels, win, label.substr(0, label.size() - packed_suffix.size()));
  return kernel || label != "flash_packed" ? kernel : find_kernel(kernels, win, "fused");
}

/// Counter-based random integers, uniform below `bound`.
struct Dice {
  std::uint64_t key;
  std::uint64_t count = 0;
  std::int64_t below(std::int64_t bound) {
    const Philox4 r = philox(key, {{static_cast<std::uint32_t>(count), static_cast<std::uint32_t>(count >> 32), 0, 0}});
    ++count;
    return static_cast<std::int64_t>(r.v[0] % static_cast<std::uint64_t>(bound));
  }
};

QueryTile packed_tile(std::int64_t rows, std::int64_t tokens) {
  QueryTile tile;
  tile.batches = static_cast<std::int32_t>(rows);
  tile.max_positions = tokens;
  return tile;
}

/// The packed tokens of a row are a window that holds them all.
LayerShape packed_shape(LayerShape shape) {
  shape.rules.w = shape.rules.n_sel * shape.rules.l_sel;
  return shape;
}

LayerShape shape_of(const Config& c, const Point& point) { return make_partition(c, point, 1, 0).shape; }

QueryTile tile_of(const Point& point) {
  QueryTile tile;
  tile.tokens = static_cast<std::int32_t>(kernel_rows(point));
  tile.max_positions = point.context;
  return tile;
}

std::int64_t kv_rows_of(const Config& c, const Point& point) {
  return point.kernel.branch == cmp ? compressed_tokens(c.nsa, point.context - 1) : point.context;
}

/// o = sum p v over the given rows of K and V, one head, in float64. Returns the largest |score|.
double attend_exactly(const float* q, const std::vector<float>& k, const std::vector<float>& v, std::int64_t width,
                      const std::vector<std::int64_t>& tokens, double* o) {
  std::vector<double> p(tokens.size());
  double max = -INFINITY, sum = 0;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    double dot = 0;
    for (std::int64_t e = 0; e < width; ++e) dot += double{q[e]} * k[tokens[i] * width + e];
    max = std::max(max, p[i] = dot / std::sqrt(static_cast<double>(width)));
  }
  const double largest_score = largest_magnitude(p);
  for (double& x : p) sum += x = std::exp(x - max);
  std::fill_n(o, width, 0.0);
  for (std::size_t i = 0; i < tokens.size(); ++i)
    for (std::int64_t e = 0; e < width; ++e) o[e] += p[i] / sum * v[tokens[i] * width + e];
  return largest_score;
}

}  // namespace

Config kernel_config(const Config& config, const Point& point) {
  Config c = config;
  c.kind = TaskKind::prefill;
  c.model.n_heads = point.kernel.heads;
  c.model.n_kv_groups = 1;
  c.model.d_k = c.model.d_v = point.kernel.head_size;
  c.nsa.n_sel = static_cast<std::int32_t>(point.kernel.blocks);
  c.parallel.heads = c.parallel.kv = 1;
  return c;
}

std::int64_t kernel_rows(const Point& point) { return point.kernel.rows == 0 ? point.context : point.kernel.rows; }

std::vector<std::int32_t> choose_blocks(Spans spans, std::int64_t rows, std::int32_t n, std::int64_t blocks,
                                        std::uint64_t seed, double overlap) {
  Dice dice{tensor_key(seed, "kernels/spans")};
  std::vector<std::int32_t> chosen;
  for (std::int64_t row = 0; row < rows; ++row) {
    const auto at = static_cast<std::uint64_t>(row);
    if (source_row(dice.key, at, repeats(overlap)) != at) {
      for (std::int32_t i = 0; i < n; ++i) chosen.push_back(chosen[chosen.size() - static_cast<std::size_t>(n)]);
      continue;
    }
    const std::int64_t together = spans == Spans::contiguous ? n : spans == Spans::mixed ? n / 2 : 0;
    const std::int64_t first = dice.below(blocks - together + 1);
    std::vector<bool> taken(static_cast<std::size_t>(blocks), false);
    std::fill_n(taken.begin() + first, together, true);
    for (std::int64_t left = n - together; left > 0;) {
      const std::int64_t block = dice.below(blocks);
      if (taken[block]) continue;
      taken[block] = true;
      --left;
    }
    for (std::int64_t block = 0; block < blocks; ++block)
      if (taken[block]) chosen.push_back(static_cast<std::int32_t>(block));
  }
  return chosen;
}

std::vector<KernelChoice> kernel_choices(const KernelTable& kernels, const Config& config, const Point& point) {
  const Branch branch = point.kernel.branch;
  const LayerShape shape = shape_of(kernel_config(config, point), point);
  const LayerShape packed = packed_shape(shape);
  std::vector<KernelChoice> choices;
  for (const std::string& label : config.kernels.implementations) {
    const bool is_packed = label.ends_with(packed_suffix);
    if (is_packed && branch != sel) continue;
    const AttendKernel* kernel = is_packed ? packed_kernel(kernels, label) : find_kernel(kernels, branch, label);
    if (!kernel) continue;
    const bool accepted = is_packed ? kernel->accepts(packed, packed_tile(kernel_rows(point), packed.rules.w))
                                    : kernel->accepts(shape, tile_of(point));
    if (accepted) choices.push_back({label, kernel, is_packed});
  }
  return choices;
}

KernelBench::KernelBench(const Allocator& allocate, const KernelTable& kernels, const Config& config,
                         const Point& point)
    : device_(allocate.device),
      kernels_(kernels),
      config_(kernel_config(config, point)),
      point_(point),
      branch_(point.kernel.branch),
      shape_(shape_of(config_, point)),
      packed_shape_(packed_shape(shape_)),
      rows_(kernel_rows(point)),
      first_position_(point.context - rows_),
      kv_rows_(kv_rows_of(config_, point)),
      tile_(tile_of(point)),
      packed_tile_(packed_tile(rows_, packed_shape_.rules.w)) {
  const std::int64_t size = static_cast<std::int64_t>(size_of(shape_.dtype));
  const auto activations = [&](std::int64_t bytes) { return allocate(MemoryKind::activations, bytes); };
  const auto copies = [&](std::int64_t rows) {
    const std::int64_t bytes = std::max<std::int64_t>(1, rows * (shape_.d_k + shape_.d_v) * size);
    return config.kernels.cold ? std::clamp<std::int64_t>((cold_bytes + bytes - 1) / bytes, 1, max_copies) : 1;
  };
  for (std::int64_t i = 0; i < copies(kv_rows_); ++i)
    kv_.push_back(make_kv(allocate, MemoryKind::caches, shape_, KvPrecision::same, 1, RowMap{}, kv_rows_));
  std::int64_t scratch = static_cast<std::int64_t>(kernels.scratch_bytes(shape_, tile_, {}));
  std::int64_t lse_rows = tile_.rows();
  if (branch_ == sel) {
    const std::int64_t blocks = first_position_ / shape_.rules.l_sel;  // whole ones in front of the rows
    selected_ = point.kernel.spans == Spans::recorded
                    ? recorded_rows(config, rows_, shape_.rules.n_sel, blocks)
                    : choose_blocks(point.kernel.spans, rows_, shape_.rules.n_sel, blocks,
                                    static_cast<std::uint64_t>(config.run.seed), config.run.overlap);
    chosen_ = activations(std::ssize(selected_) * 4);
  }
  const std::vector<KernelChoice> choices = kernel_choices(kernels, config, point);
  if (std::any_of(choices.begin(), choices.end(), [](const KernelChoice& c) { return c.packed; })) {
    const std::int64_t tokens = packed_shape_.rules.w;
    for (std::int64_t i = 0; i < copies(rows_ * tokens); ++i)
      packed_.push_back(
          make_kv(allocate, MemoryKind::caches, packed_shape_, KvPrecision::same, rows_, RowMap{}, tokens));
    scratch = std::max(scratch, static_cast<std::int64_t>(kernels.scratch_bytes(packed_shape_, packed_tile_, {})));
  }
  positions_ = activations(2 * 8);
  q_ = activations(rows_ * shape_.heads() * shape_.d_k * size);
  partials_ = activations(partial_floats(shape_, rows_) * 4);
  reads_ = activations(rows_ * 8);  // packed: every row is a sequence
  if (branch_ == cmp) {
    scores_ =
        allocate(MemoryKind::workspace,
                 static_cast<std::int64_t>(kernels.score_bytes(shape_, tile_, std::max<std::int64_t>(1, kv_rows_))));
    lse_ = activations(std::int64_t{shape_.lse.buckets} * lse_rows * shape_.heads() * 2 * 4);
  }
  for (const KernelChoice& choice : kernel_choices(kernels, config, point))
    if (choice.kernel->scratch)
      scratch = std::max(
          scratch, static_cast<std::int64_t>(choice.packed ? choice.kernel->scratch(packed_shape_, packed_tile_, {})
                                                           : choice.kernel->scratch(shape_, tile_, {})));
  scratch_ = allocate(MemoryKind::workspace, scratch);
}

void KernelBench::fill(Stream* stream) {
  const TensorSource source(config_, "");
  const std::size_t size = size_of(shape_.dtype);
  for (const KvPair& pair : kv_)
    for (const bool value : {false, true}) {
      FillRowsArgs args;
      args.dtype = shape_.dtype;
      args.dst = value ? pair.v : pair.k;
      args.last = kv_rows_;
      args.key = source.key(value ? "kernels/v" : "kernels/k");
      kernels_.fill_rows(args, stream);
    }
  for (const KvPair& pair : packed_)
    for (std::size_t i = 0; i < selected_.size(); ++i)
      for (const bool value : {false, true}) {
        const KvView &from = value ? kv_[0].v : kv_[0].k, &to = value ? pair.v : pair.k;
        const std::size_t block = static_cast<std::size_t>(shape_.rules.l_sel) * from.width * size;
        device_.copy(static_cast<std::byte*>(to.data) + i * block,
                     static_cast<const std::byte*>(from.data) + static_cast<std::size_t>(selected_[i]) * block, block,
                     stream);
      }
  const std::vector<std::int64_t> positions = {first_position_, packed_shape_.rules.w - 1},
                                  q_shape{rows_, shape_.heads(), shape_.d_k};
  const std::vector<std::byte> q =
      to_storage(source.slab("kernels/q", q_shape, 1.0f, {0, 0, 0}, q_shape), shape_.dtype);
  device_.copy(positions_.data(), positions.data(), positions.size() * 8, stream);
  device_.copy(q_.data(), q.data(), q.size(), stream);
  if (!selected_.empty()) device_.copy(chosen_.data(), selected_.data(), selected_.size() * 4, stream);
  clear(stream);
  device_.synchronize(stream);  // before the copied host values are destroyed
}

AttendArgs KernelBench::args_of(const KernelChoice& choice, std::int64_t at) const {
  AttendArgs args;
  args.shape = choice.packed ? packed_shape_ : shape_;
  args.tile = choice.packed ? packed_tile_ : tile_;
  args.tile.first_position = positions_.as<std::int64_t>() + (choice.packed ? 1 : 0);
  args.q = q_.data();
  const std::vector<KvPair>& copies = choice.packed ? packed_ : kv_;
  const KvPair& pair = copies[static_cast<std::size_t>(at % std::ssize(copies))];
  args.k = pair.k;
  args.v = pair.v;
  args.out = partials_at(partials_.as<float>(), shape_, rows_, branch_);
  args.reads = reads_.as<std::int64_t>();
  if (!choice.packed && branch_ == sel) args.selected = chosen_.as<std::int32_t>();
  if (branch_ == cmp) {
    args.lse = lse_.as<float>();
    args.scores = scores_.data();
  }
  args.scratch = scratch_.data();
  args.scratch_bytes = scratch_.bytes();
  return args;
}

void KernelBench::run(const KernelChoice& choice, std::int64_t at, Stream* stream) const {
  choice.kernel->run(args_of(choice, at), stream);
}

std::string KernelBench::variant(const KernelChoice& choice) const {
  return choice.kernel->variant_name(args_of(choice, 0));
}

void KernelBench::clear(Stream* stream) const {
  device_.fill(partials_.data(), 0xFF, partials_.bytes(), stream);
  device_.fill(reads_.data(), 0, reads_.bytes(), stream);
}

std::vector<float> KernelBench::download(const void* from, std::int64_t count, Stream* stream) const {
  std::vector<std::byte> stored(static_cast<std::size_t>(count) * size_of(shape_.dtype));
  device_.copy(stored.data(), from, stored.size(), stream);
  device_.synchronize(stream);
  return from_storage(stored.data(), static_cast<std::size_t>(count), shape_.dtype);
}

std::vector<float> KernelBench::output(Stream* stream) const {
  const Partials at = partials_at(partials_.as<float>(), shape_, rows_, branch_);
  const std::int64_t heads = rows_ * shape_.heads();
  std::vector<float> o(static_cast<std::size_t>(heads * shape_.d_v)), ms(static_cast<std::size_t>(heads * 2));
  device_.copy(o.data(), at.o, o.size() * 4, stream);
  device_.copy(ms.data(), at.ms, ms.size() * 4, stream);
  device_.synchronize(stream);
  for (std::int64_t i = 0; i < std::ssize(o); ++i) {
    const float sum = ms[static_cast<std::size_t>(i / shape_.d_v * 2 + 1)];
    if (sum != 0) o[static_cast<std::size_t>(i)] /= sum;  // without attended tokens o is 0
  }
  return o;
}

std::int64_t KernelBench::reads(Stream* stream) const {
  std::vector<std::int64_t> counted(static_cast<std::size_t>(rows_));
  device_.copy(counted.data(), reads_.data(), counted.size() * 8, stream);
  device_.synchronize(stream);
  std::int64_t sum = 0;
  for (const std::int64_t n : counted) sum += n;
  return sum;
}

std::vector<std::int64_t> KernelBench::tokens_of(std::int64_t row) const {
  const BlockRules& r = shape_.rules;
  const std::int64_t t = first_position_ + row;
  std::vector<std::int64_t> tokens;
  const auto add = [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) tokens.push_back(i);
  };
  if (branch_ == cmp) add(0, t + 1 < r.l ? 0 : (t + 1 - r.l) / r.d + 1);
  if (branch_ == win) add(std::max<std::int64_t>(0, t + 1 - r.w), t + 1);
  for (std::int64_t i = 0; branch_ == sel && i < r.n_sel; ++i) {
    const std::int64_t block = selected_[static_cast<std::size_t>(row * r.n_sel + i)];
    add(block * r.l_sel, (block + 1) * r.l_sel);
  }
  return tokens;
}

double KernelBench::blocks_shared() const {
  SharedBlocks shared;
  if (branch_ == sel) shared.add(selected_.data(), rows_, 1, shape_.rules.n_sel);
  return shared.mean();
}

std::int64_t KernelBench::expected_reads_total() const {
  std::int64_t sum = 0;
  for (std::int64_t row = 0; row < rows_; ++row) sum += std::ssize(tokens_of(row));
  return sum;
}

ExactOutputs KernelBench::oracle(Stream* stream, int threads) const {
  const std::int64_t heads = shape_.heads(), width = shape_.d_k;
  const std::vector<float> q = download(q_.data(), rows_ * heads * width, stream);
  const std::vector<float> k = download(kv_[0].k.data, kv_rows_ * width, stream);
  const std::vector<float> v = download(kv_[0].v.data, kv_rows_ * width, stream);
  ExactOutputs exact{std::vector<double>(static_cast<std::size_t>(rows_ * heads * width)),
                     std::vector<double>(static_cast<std::size_t>(rows_))};
  const auto attend_rows = [&](std::int64_t first, std::int64_t step) {
    for (std::int64_t row = first; row < rows_; row += step) {
      const std::vector<std::int64_t> tokens = tokens_of(row);
      double scale = 0, score = 0;
      for (const std::int64_t token : tokens)
        scale = std::max(scale, largest_magnitude(std::span(v).subspan(static_cast<std::size_t>(token * width),
                                                                       static_cast<std::size_t>(width))));
      for (std::int64_t head = row * heads; head < (row + 1) * heads; ++head)
        score = std::max(score,
                         attend_exactly(q.data() + head * width, k, v, width, tokens, exact.o.data() + head * width));
      exact.bounds[static_cast<std::size_t>(row)] = error_bound(shape_.dtype, scale, score);
    }
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(attend_rows, i, threads);
  attend_rows(0, threads);
  for (std::thread& other : others) other.join();
  return exact;
}

KernelError kernel_error(const std::vector<float>& output, const ExactOutputs& exact) {
  const std::size_t rows = exact.bounds.size(), width = output.size() / rows;
  KernelError error{0, 0, 0, 0};
  double squares = 0;
  for (std::size_t row = 0; row < rows; ++row) {
    double sum = 0;
    for (std::size_t i = row * width; i < (row + 1) * width; ++i) {
      const double difference = std::abs(output[i] - exact.o[i]);
      const double absolute = std::isnan(difference) ? INFINITY : difference;
      sum += absolute;
      error.largest = std::max(error.largest, absolute);
      error.excess = std::max(error.excess, absolute / exact.bounds[row]);
    }
    const double mean = sum / static_cast<double>(width), step = mean - error.mean;
    error.mean += step / static_cast<double>(row + 1);
    squares += step * (mean - error.mean);
  }
  if (rows > 1) error.standard_error = std::sqrt(squares / static_cast<double>(rows - 1) / static_cast<double>(rows));
  return error;
}

}  // namespace nsa
