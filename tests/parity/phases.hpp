#pragma once
// Runs of one phase, prefill or decode, and their comparison with the oracle and with each other. Checks are Catch2's.

#include <map>
#include <string>

#include "parity/expected.hpp"

namespace parity {

Phase run_phase(const nsa::Config& config);
Phase run_phase(const Shape& shape, nsa::TaskKind kind);

/// The amount by which rounded softmax weights widen the mean bound of a tensor.
using Moves = std::map<std::string, double>;

/// Compares every recorded tensor of a phase with the oracle.
Moves check_phase(const Phase& phase);

/// Compares the rows of `decode` with the same rows of `prefill`. Both are within the bound of the oracle, each widened
/// by its own moves, and each in units of the largest value of all of its rows.
void check_continuation(const Phase& prefill, const Phase& decode, const Moves& moves);

}  // namespace parity
