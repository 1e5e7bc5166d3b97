// The CUDA kernel table and the planned one, which plans ask where there is no GPU. The first test needs none.

#include "catch.hpp"
#include "gpu/mirrored.hpp"
#include "kernels/cuda/sizes/planned_kernels.hpp"

namespace nsa::gpu {
const KernelTable& kernel_table();  // kernel_table.cu
}

using namespace nsa;

TEST_CASE("what runs has the names, shapes and sizes that are planned", "[sizes]") {
  const KernelTable &runs = nsa::gpu::kernel_table(), &planned = nsa::gpu::planned_kernels();
  for (const Branch branch : {cmp, sel, win}) {
    REQUIRE(runs.attend[branch].size() == planned.attend[branch].size());
    for (std::size_t i = 0; i < planned.attend[branch].size(); ++i) {
      const AttendKernel &run = runs.attend[branch][i], &plan = planned.attend[branch][i];
      INFO(branch_names[branch] << " " << plan.name);
      CHECK(std::string(run.name) == plan.name);
      CHECK(run.run != nullptr);
      CHECK((run.accepts == plan.accepts && run.scratch == plan.scratch));
      CHECK(run.recompute_scores == plan.recompute_scores);
    }
  }
  CHECK((runs.scratch_bytes == planned.scratch_bytes && runs.score_bytes == planned.score_bytes));
  CHECK(runs.max_tile_tokens == planned.max_tile_tokens);
  CHECK(runs.tile_score_budget == planned.tile_score_budget);
  CHECK(runs.max_exchange_memory == planned.max_exchange_memory);
}

TEST_CASE("a plan by compute capability has the shared memory of the GPU here", "[sizes][device]") {
  const Backend& backend = nsa::test::gpu();
  CHECK(nsa::gpu::limits().capability == backend.capability);
  CHECK(nsa::gpu::limits().shared_bytes == nsa::gpu::shared_bytes_of(backend.capability));
}
