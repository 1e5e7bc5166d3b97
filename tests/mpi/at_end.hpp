#pragma once
// What tests of several ranks keep open from case to case.

#include <functional>

/// Every rank calls `close` after its last test, while MPI still runs.
void at_end(std::function<void()> close);
