#pragma once
// What must not change while a point is measured: the cached K and V, and the output of a step. The sampled float64
// check (verify/float64_check.hpp) covers the recorded pass; this compares the measured passes with it.

#include <cstdint>
#include <string>
#include <vector>

#include "nsa/model/model_shard.hpp"

namespace nsa {

/// Checksum of this rank's cached rows of the prefix and the context of every sequence, in the first `layers` layers: K
/// and V of sel and cmp, and the rings. Any changed bit changes it.
std::uint64_t cache_checksum(ModelShard& shard, std::int64_t layers);

/// The output of the last step or tile on this rank: o [rows, heads, d_v] and, in decode of whole layers, y [rows,
/// dim].
struct StepOutput {
  std::vector<float> o, y;
  std::vector<std::int32_t> selected;  ///< decode: the chosen blocks of every step
  std::size_t fallbacks = 0;           ///< number of fallbacks so far
  double scale = 0;                    ///< of the output to be reproduced: largest |v| that the float64 check saw
};
StepOutput latest_output(ModelShard& shard, const StepBuffers& buffers, std::int64_t rows, bool with_y);

/// "" or the problem: a value that is not finite or, where `expected` is not empty, one that differs from it by more
/// than rounding.
std::string output_problem(const StepOutput& output, const StepOutput& expected, DType type);

/// The same, where `output` and `expected` may come from different implementations: a fallback took over, or the
/// backend fuses stages that are not timed one by one (CUDA). Sums are then in another order, and of two blocks whose
/// scores differ by rounding only, the other one may be chosen: the output differs by more than rounding and is right.
/// So values are compared only where all ranks chose the same blocks in all steps, and another choice is a problem only
/// under the same arithmetic, or where `same_inputs`: q and the compressed tokens have the same bits in both. Every
/// implementation and layout then chooses the same blocks, unless a fallback took over. Collective.
std::string pass_problem(const ControlComm& world, const ModelShard& shard, const StepOutput& output,
                         const StepOutput& expected, bool same_inputs);

}  // namespace nsa
