#pragma once
// How many cores a rank may use.

#include "comm/session.hpp"

namespace nsa {

/// This rank's share of the cores it may run on: ranks of one host with the same affinity share them, as all do
/// when the launcher binds nobody. At least 1. Collective.
int fair_threads(const Control& world);

/// Sets the host backend's threads to that, unless OMP_NUM_THREADS says how many. Collective.
void choose_host_threads(const Control& world);

}  // namespace nsa
