// Opens the backend of a rank: the only place that chooses between host and CUDA.

#include "kernels/cuda/sizes/planned_kernels.hpp"
#include "kernels/diagnostics/error.hpp"
#include "kernels/host/runtime/host.hpp"
#include "kernels/interface/backend.hpp"
#ifdef NSA_CUDA
#include "kernels/cuda/runtime/cuda.hpp"
#endif

namespace nsa {

bool cuda_built() noexcept {
#ifdef NSA_CUDA
  return true;
#else
  return false;
#endif
}

Backend planned_backend(const PlannedGpu& planned) {
  gpu::set_limits({planned.sms, planned.capability, gpu::shared_bytes_of(planned.capability)});
  return {BackendKind::cuda, &gpu::planned_kernels(), nullptr, planned.capability};
}

Backend open_backend(BackendKind kind, [[maybe_unused]] int local_rank) {
  if (kind == BackendKind::host) return {BackendKind::host, &host_kernels(), &host_device()};
#ifdef NSA_CUDA
  return open_cuda(local_rank);
#else
  throw UserError(
      "this build has no CUDA (it was configured with NSA_CUDA=OFF); configure with the cuda preset, or set "
      "run.backend = \"host\"");
#endif
}

}  // namespace nsa
