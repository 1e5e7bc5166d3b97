#pragma once
// The results that the oracle expects of a phase, and how far rounded softmax weights may change them.

#include <map>
#include <optional>
#include <string>

#include "parity/compare.hpp"
#include "parity/product.hpp"

namespace parity {

/// A phase of the program and its record.
struct Phase {
  nsa::Config config;
  nsa::PointRecord record;
};

/// The options under which the oracle rounds like the program: matrix products on a GPU (sdpa_gemm, masked) store the
/// softmax weights, as frameworks without custom kernels do.
oracle::Options options_of(const Phase& phase);

/// The oracle's last layer from the phase's own x and weights, or from its given q, k, v, gates.
oracle::Layer expect(const Phase& phase, const std::optional<oracle::Chosen>& chosen = {});

/// By name of a recorded tensor the standard deviation of its change by rounded softmax weights, of all positions; only
/// tensors that change. After several layers every tensor of the last one changes: the deviation is estimated from a
/// run of the oracle that rounds the weights itself.
std::map<std::string, oracle::Reals> moves_by_name(const Phase& phase, const oracle::Layer& expected,
                                                   const std::optional<oracle::Chosen>& chosen = {});

/// The rows of `all` positions that the phase recorded.
template <class T>
oracle::Array<T> recorded_rows(const Phase& phase, const oracle::Array<T>& all) {
  const std::int64_t rows = options_of(phase).tokens - phase.record.first_position;  // of the longest sequence
  return rows_of(all, first_of(phase.record), rows);
}

enum class Against { oracle, layout };

/// Whether branch c rounds softmax weights in a way that the other side does not reproduce. Kernels on tensor cores
/// round relative to a running maximum, which neither the oracle nor another layout reproduces. Matrix products store
/// the weights relative to the maximum of a rank's rows, which the oracle reproduces on one rank.
bool rounds_weights(const Phase& phase, int c, Against against = Against::oracle);

/// [B, T, H, Dv]: the standard deviation of the change of o_branch by that rounding; zero where there is none.
oracle::Reals moves_of(const Phase& phase, const oracle::Attended& attended, int c, Against against = Against::oracle);

/// The same of o, the sum of the branches by their gates.
oracle::Reals moves_of_sum(const Phase& phase, const oracle::Layer& layer, Against against = Against::oracle);

}  // namespace parity
