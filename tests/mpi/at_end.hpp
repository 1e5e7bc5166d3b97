#pragma once
// Closes what tests of several ranks keep open from one test case to the next.

#include <functional>

/// Registers `close`: every rank calls it after its last test, before MPI_Finalize.
void at_end(std::function<void()> close);
