// The default routes and the guards, each with its reason. A measured rule names the measurement; a new device takes
// `sdpa` until a result file of that device shows a better route (nsa gate).

#include "nsa/routing/router.hpp"

namespace nsa {
namespace {

constexpr bool cuda_on(const RouteKey& q, int capability) {
  return q.backend == BackendKind::cuda && q.capability == capability;
}

/// Types and head sizes that the tensor-core kernels cover; everything else in `fused` is scalar arithmetic.
constexpr bool on_tensor_cores(const RouteKey& q) {
  return q.dtype != DType::f32 && q.d_k % 16 == 0 && q.d_v % 16 == 0 && q.d_k <= 256 && q.d_v <= 256;
}

struct Rule {
  bool (*applies)(const RouteKey&);
  const char* name;
  const char* reason;
};

/// The first rule that applies decides.
constexpr Rule defaults[] = {
    {[](const RouteKey& q) { return q.backend == BackendKind::host; }, "fused",
     "no gather and weights that stay in the cache: 2.2 to 8.2 times as fast as sdpa on two cores of an AMD EPYC "
     "(docs/M4.md)"},
    {[](const RouteKey& q) { return cuda_on(q, 89); }, "sdpa",
     "nsa-vibe's decision for the RTX 4090: FlashAttention-2 at 0.01 to 0.20 of SDPA's speed, Triton selection slower "
     "and unstable (ADR-2025-08-M4-02)"},
    {[](const RouteKey& q) { return cuda_on(q, 90) && on_tensor_cores(q) && q.phase == Phase::decode; }, "fused",
     "1.3 to 5.9 times as fast as sdpa_gemm on an H200, each branch at 8K and 64K (docs/ROUTES.md); sel 1.3 times as "
     "fast as sdpa (docs/kernels/log/sdpa.md)"},
    {[](const RouteKey& q) { return cuda_on(q, 90) && on_tensor_cores(q); }, "fused",
     "6 to 11 times as fast as sdpa_gemm on an H200, each branch at 8K (docs/ROUTES.md); sel 1.6 to 5.3 times as fast "
     "as sdpa (docs/M4.md)"},
    {[](const RouteKey& q) { return cuda_on(q, 90) && q.phase == Phase::decode; }, "fused",
     "no gather; scalar arithmetic at this type or head size, but few rows"},
    {[](const RouteKey& q) { return cuda_on(q, 90) && q.dtype != DType::f32; }, "sdpa_gemm",
     "3.2 times as fast on an H200 as the scalar kernel (Dk = Dv = 256 at 4K; docs/ROUTES.md), which is all that "
     "`fused` has where head sizes are beyond 256 or no multiple of 16"},
    {[](const RouteKey& q) { return cuda_on(q, 90); }, "fused",
     "no gather, and softmax weights stay in fp32; scalar arithmetic at this type or head size"},
    {[](const RouteKey&) { return true; }, "sdpa", "not measured: no result file of ours for this case"},
};

constexpr Rule guards[] = {
    {[](const RouteKey& q) { return cuda_on(q, 89); }, "fused",
     "custom kernels are off on compute capability 8.9 (ADR-2025-08-M4-02: slower than SDPA there)"},
    {[](const RouteKey& q) { return cuda_on(q, 89); }, "flash",
     "tiled dense attention is off on compute capability 8.9 (nsa-vibe measured 0.01 to 0.20 of SDPA's speed)"},
};

}  // namespace

RouteChoice default_route(const RouteKey& key) {
  const Rule* rule = defaults;
  while (!rule->applies(key)) ++rule;
  return {rule->name, rule->reason, false};
}

std::string guard(const RouteKey& key, const std::string& name) {
  for (const Rule& rule : guards)
    if (rule.name == name && rule.applies(key)) return rule.reason;
  return "";
}

}  // namespace nsa
