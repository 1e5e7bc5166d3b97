#pragma once
// Runs local work and reports its errors on all ranks.

#include <new>
#include <string>

#include "comm/session.hpp"
#include "kernels/diagnostics/out_of_memory.hpp"

namespace nsa {

/// Runs local work that may fail on some ranks only, then calls ControlComm::agree. The work must not contain a
/// collective. Collective over `world`.
template <class Work>
void agreed(const ControlComm& world, Work&& work) {
  ExitCode code = ExitCode::ok;
  std::string message;
  try {
    work();
  } catch (const UserError& e) {
    code = e.code(), message = e.what();
  } catch (const std::bad_alloc&) {
    code = ExitCode::device, message = out_of_memory();
  }
  world.agree(code, message);
}

}  // namespace nsa
