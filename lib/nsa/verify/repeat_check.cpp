#include "nsa/verify/repeat_check.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "nsa/model/inputs.hpp"
#include "nsa/results/error_bound.hpp"

namespace nsa {

namespace {

void add_rows(ModelShard& shard, const KvPair& pair, const SequenceRange& sequences, std::int64_t first,
              std::int64_t last) {
  const LayerShape& s = shard.shape();
  for (const KvView& view : {pair.k, pair.v})
    if (view.data && first < last)
      shard.kernels().checksum({s.dtype, of_sequences(view, sequences, s.groups, s.dtype), sequences.count * s.groups,
                                first, last, shard.checksum.as<std::uint64_t>()},
                               shard.streams.compute);
}

/// The largest difference; infinite where a value is not finite.
double difference(const std::vector<float>& got, const std::vector<float>& expected) {
  double worst = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (!std::isfinite(got[i])) return INFINITY;
    if (!expected.empty()) worst = std::max(worst, std::abs(double{got[i]} - expected[i]));
  }
  return worst;
}

}  // namespace

std::uint64_t cache_checksum(ModelShard& shard, std::int64_t layers) {
  const BlockRules& r = shard.shape().rules;
  shard.device().fill(shard.checksum.data(), 0, shard.checksum.bytes(), shard.streams.compute);
  for (std::int64_t layer = 0; layer < layers; ++layer) {
    const LayerCaches& cache = shard.caches[static_cast<std::size_t>(layer)];
    for (const SequenceRange& some : equal_sequences(shard.point)) {
      const std::int64_t positions = shard.config.run.prefix + shard.point.length(some.begin);
      add_rows(shard, cache.sel, some, 0, positions);
      add_rows(shard, cache.cmp, some, 0, compressed_tokens(r, positions - 1));
      add_rows(shard, cache.win, some, std::max<std::int64_t>(0, positions - r.w), positions);
      add_rows(shard, cache.raw, some, std::max<std::int64_t>(0, positions - r.l), positions);
    }
  }
  return static_cast<std::uint64_t>(download_longs(shard, shard.checksum.data(), 1)[0]);
}

StepOutput latest_output(ModelShard& shard, const StepBuffers& b, std::int64_t rows, bool with_y) {
  const LayerShape& s = shard.shape();
  StepOutput output;
  if (rows == 0) return output;
  output.o = download(shard, b.o.data(), rows * s.heads() * s.d_v, s.dtype);
  if (with_y && b.y.data()) output.y = download(shard, b.y.data(), rows * s.dim, DType::f32);
  return output;
}

std::string output_problem(const StepOutput& output, const StepOutput& expected, DType type) {
  const double o = difference(output.o, expected.o), y = difference(output.y, expected.y);
  if (std::isinf(o) || std::isinf(y)) return "the output is not finite";
  // y is a sum over all heads, whose roundings add up.
  const bool same = o <= error_bound(type, expected.scale) &&
                    y <= error_bound(type, expected.scale + 5 * largest_magnitude(expected.y));
  return same ? ""
              : fmt::format("a measured step gave another output (by {:.3g}) than the checked one", std::max(o, y));
}

std::string pass_problem(const ControlComm& world, const ModelShard& shard, const StepOutput& output,
                         const StepOutput& expected, bool same_inputs) {
  const KernelTable& kernels = shard.kernels();
  const bool other_blocks = output.selected != expected.selected;
  const bool fuses = kernels.prologue.accepts || kernels.decode_attention.accepts;
  const bool other_arithmetic = (fuses && !same_inputs) || output.fallbacks != expected.fallbacks;
  const bool same_blocks = world.max(std::int64_t{other_blocks}) == 0,
             same_arithmetic = world.max(std::int64_t{other_arithmetic}) == 0;
  if (other_blocks && same_arithmetic) return "a measured pass chose other blocks than the checked one";
  return output_problem(output, same_blocks ? expected : StepOutput(), shard.shape().dtype);
}

}  // namespace nsa
