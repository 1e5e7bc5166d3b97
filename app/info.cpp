#include "app/info.hpp"

#include <fmt/format.h>
#include <fmt/ostream.h>

#include "app/build_info.hpp"
#include "app/threads.hpp"
#include "comm/collectives/communicator.hpp"
#include "comm/session.hpp"
#include "kernels/diagnostics/fault_injection.hpp"
#include "kernels/interface/backend.hpp"

namespace nsa {
namespace {

void print_device(std::ostream& out, const char* name, BackendKind kind) {
  try {
    const DeviceInfo info = open_backend(kind, 0).device->info();
    const bool cuda = kind == BackendKind::cuda;
    fmt::print(out, "{:<10} {}, {}, {} {}, {:.1f} of {:.1f} GB free\n", name, info.name, info.architecture, info.units,
               cuda ? "SMs" : "threads", static_cast<double>(info.memory_free) / 1e9,
               static_cast<double>(info.memory_total) / 1e9);
    if (cuda) fmt::print(out, "{:<10} driver {}, runtime {}\n", "", info.driver, info.runtime);
  } catch (const UserError& error) {
    fmt::print(out, "{:<10} {}\n", name, error.what());
  }
}

}  // namespace

void print_info(std::ostream& out) {
  const auto line = [&](const char* name, const std::string& value) { fmt::print(out, "{:<10} {}\n", name, value); };
  line("nsa", fmt::format("{} (commit {})", build::version, build::git_commit));
  line("compiler", fmt::format("{}, {}", build::compiler, build::build_type));
  line("MPI", MpiSession::library_version());
  line("HDF5", build::hdf5);
  line("BLAS", build::blas);
  line("CUDA", build::cuda);
  if (const std::string nccl = Communicator::library_version(); !nccl.empty()) line("NCCL", nccl);
  if (fault::built) line("faults", "built in, for tests (NSA_FAULT)");
  const int threads = requested_threads();
  line("threads",
       threads > 0 ? fmt::format("{} a rank (OMP_NUM_THREADS)", threads) : "a rank's share of the cores it may use");
  print_device(out, "host", BackendKind::host);
  if (cuda_built()) print_device(out, "cuda", BackendKind::cuda);
}

}  // namespace nsa
