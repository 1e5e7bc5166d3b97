#pragma once
// What a step of a point is made of. A mixed step (task.kind = "mixed") has two parts: decode rows and a prefill chunk.

#include <vector>

#include "nsa/config/config.hpp"

namespace nsa {

/// A part of a point, as the config and the point that run it alone.
struct Part {
  Config config;
  Point point;
};

/// The decode rows of a mixed point: a decode without the chunk.
Part decode_rows_of(const Config& mixed, const Point& point);
/// The chunk of a mixed point: a prefill of run.prefill_chunk tokens of one sequence onto run.prefix.
Part prefill_chunk_of(const Config& mixed, const Point& point);
/// Both parts of a mixed point, in the order in which a layer runs them; of another kind the point itself.
std::vector<Part> parts_of(const Config& config, const Point& point);

}  // namespace nsa
