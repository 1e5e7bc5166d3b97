#pragma once
// What the oracle says to a phase of the program, and how far rounded softmax weights may move that.

#include <optional>

#include "parity/compare.hpp"
#include "parity/product.hpp"

namespace parity {

/// A phase of the program and what it recorded.
struct Phase {
  nsa::Config config;
  nsa::PointRecord record;
};

/// The oracle does as the program: by matrix products on a GPU (sdpa, masked) softmax weights are stored, as frameworks
/// without custom kernels have them.
oracle::Options options_of(const Phase& phase);

/// The oracle's last layer from the phase's own x and weights, or from its given q, k, v, gates.
oracle::Layer expect(const Phase& phase, const std::optional<oracle::Chosen>& chosen = {});

/// The phase's positions of a tensor of all.
oracle::Reals recorded_rows(const Phase& phase, const oracle::Reals& all);

enum class Against { oracle, layout };

/// Whether branch c rounds softmax weights as the other side does not: kernels on tensor cores relative to a running
/// maximum, which neither the oracle nor another layout follows; matrix products, which store them, relative to the
/// maximum of what a rank holds, which the oracle does follow on one rank.
bool rounds_weights(const Phase& phase, int c, Against against = Against::oracle);

/// [B, T, H, Dv]: how far that moves o_branch, as a standard deviation; zero where it does not.
oracle::Reals moves_of(const Phase& phase, const oracle::Attended& attended, int c, Against against = Against::oracle);

/// The same of o, the sum of the branches by their gates.
oracle::Reals moves_of_sum(const Phase& phase, const oracle::Layer& layer, Against against = Against::oracle);

}  // namespace parity
