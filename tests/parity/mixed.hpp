#pragma once
// A mixed step beside its two parts alone. Checks are Catch2's.

#include "parity/phases.hpp"

namespace parity {

/// Mixed steps of a shape: its decode steps, and beside each the prefill of `chunk` tokens onto `prefix`.
nsa::Config mixed_config_of(const Shape& shape, std::int64_t prefix, std::int64_t chunk);

/// The tensors of the mixed record are those of its parts, bit for bit; its reads at each step are theirs together.
void check_parts(const nsa::PointRecord& mixed, const nsa::PointRecord& rows, const nsa::PointRecord& chunk);

}  // namespace parity
