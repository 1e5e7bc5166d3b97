// Decode stages of the host on paged caches: the bits of contiguous ones, and nothing read outside of a sequence's
// pages.

#include <cmath>
#include <string>
#include <vector>

#include "catch.hpp"
#include "gpu/paged_caches.hpp"

using namespace nsa;
using namespace nsa::test;

namespace {

struct Result {
  std::vector<float> partials;
  std::vector<std::int32_t> selected;
  std::vector<std::int64_t> reads;
  bool operator==(const Result&) const = default;
};

Result run(const WholeDecode& whole, const WholeDecode::Set& set, const std::string& route) {
  WorkMemory memory{whole.backend, {}, {}};
  StepMemory step = whole.step(set);
  step.stage.scratch_bytes = scratch_of_routes(whole);
  step.stage.scratch = memory.make(static_cast<std::int64_t>(step.stage.scratch_bytes));
  const KernelTable& kernels = *whole.backend.kernels;
  const auto attend = [&](Branch c) {
    for (const AttendKernel& kernel : kernels.attend[c])
      if (kernel.name == route || (c != sel && &kernel == &kernels.attend[c][0])) {
        kernel.run(step.attend_args(c), whole.stream);
        return;
      }
  };
  const std::int64_t lists = whole.tile.rows() * whole.s.groups;
  std::fill_n(whole.reads, branches * lists, 0);
  attend(cmp);
  attend(win);
  kernels.rank(step.rank_args(), whole.stream);
  attend(sel);
  return {{whole.partials, whole.partials + partial_floats(whole.s, whole.tile.rows())},
          {whole.selected, whole.selected + lists * whole.s.rules.n_sel},
          {whole.reads, whole.reads + branches * lists}};
}

bool is_finite(const std::vector<float>& values) {  // but for the maximum of a branch without tokens
  return std::ranges::none_of(values, [](float x) { return std::isnan(x); });
}

}  // namespace

TEST_CASE("host decode on paged caches has the bits of contiguous ones, and reads no other page", "[paged]") {
  const Backend host = open_backend(BackendKind::host, 0);
  for (const DType type : {DType::f32, DType::bf16, DType::f16})
    for (const std::vector<std::int64_t>& contexts :
         std::vector<std::vector<std::int64_t>>{{1, 1}, {63, 63, 63}, {2000, 2000}, {1500, 64, 700}}) {
      LayerShape s;
      s.groups = 2, s.heads_per_group = 2, s.d_k = 16, s.d_v = 24, s.dtype = type;
      const WholeDecode whole(host, s, contexts, 1);
      for (const std::int32_t tokens : {64, 192}) {
        const PagedCaches paged(whole, tokens, tokens == 64 ? 1 : 0);
        for (const std::string route : {"fused", "sdpa", "masked"}) {
          INFO("type " << static_cast<int>(type) << ", longest " << whole.tile.max_positions << ", pages of " << tokens
                       << ", " << route);
          const Result expected = run(whole, whole.sets[0], route), got = run(whole, paged.set, route);
          CHECK(is_finite(expected.partials));
          CHECK(got == expected);
        }
      }
    }
}
