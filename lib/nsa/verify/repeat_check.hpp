#pragma once
// What must not change while a point is measured: the K and V that are in the caches, and what a step gives. The
// sampled float64 check (verify/float64_check.hpp) sees the recorded pass; this ties the measured passes to it.

#include <cstdint>
#include <string>
#include <vector>

#include "nsa/model/model_shard.hpp"

namespace nsa {

/// Of this rank's cached rows of the first `positions` positions, in the first `layers` layers: K and V of sel and cmp,
/// and the rings as they stand. One bit more or less changes it.
std::uint64_t cache_checksum(ModelShard& shard, std::int64_t positions, std::int64_t layers);

/// What the last step or tile gave on this rank: o [rows, heads, d_v] and, in decode of whole layers, y [rows, dim].
struct StepOutput {
  std::vector<float> o, y;
  std::vector<std::int32_t> selected;  ///< decode: the blocks that every step chose
  std::size_t fallbacks = 0;           ///< how many there had been by then
};
StepOutput latest_output(ModelShard& shard, const StepBuffers& buffers, std::int64_t rows, bool with_y);

/// "" or what is wrong: a value that is not finite; and, where `expected` is not empty, one that differs from it by
/// more than rounding.
std::string output_problem(const StepOutput& output, const StepOutput& expected, DType type);

/// The same, where another implementation may have made the output than the expected one: a fallback took over, or the
/// backend joins stages where they are not timed apart (CUDA). It adds up in another order, and where two blocks score
/// alike to rounding it may choose the other one: its output then differs by more than rounding and is right. So values
/// are compared where all ranks chose the same blocks all along, and another choice is a problem only where the same
/// arithmetic made it. Collective.
std::string pass_problem(const ControlComm& world, const ModelShard& shard, const StepOutput& output,
                         const StepOutput& expected);

}  // namespace nsa
