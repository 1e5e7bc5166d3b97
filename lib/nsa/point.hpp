#pragma once
// The two kinds of measured points.

#include <exception>
#include <string>

#include "nsa/experiment.hpp"
#include "nsa/weights.hpp"

namespace nsa {

/// Runs local work that may fail on some ranks only; then all ranks agree. No collective may stand inside.
template <class Work>
void agreed(const Control& world, Work&& work) {
  ExitCode code = ExitCode::ok;
  std::string message;
  try {
    work();
  } catch (const UserError& e) {
    code = e.code(), message = e.what();
  } catch (const std::bad_alloc&) {
    code = ExitCode::device, message = "out of host memory (an allocation failed); use more ranks or a smaller context";
  }
  world.agree(code, message);
}

/// Both fill the record (rank 0: whole) and return the memory this rank used. Collective.
MemoryAccount run_decode(const Session& session, const Config& config, const Point& point, const TensorSource& source,
                         PointRecord& record, const Progress& progress);
MemoryAccount run_prefill(const Session& session, const Config& config, const Point& point, const TensorSource& source,
                          PointRecord& record, const Progress& progress);

}  // namespace nsa
