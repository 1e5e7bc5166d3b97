// The same inputs must give the same bits in every run. This finds races whose results are within the tolerances: when
// slots were released before an ldmatrix had completed, one query and group in a thousand prefills was off by a few
// percent, and every other test passed.

#include "catch.hpp"
#include "gpu/differences.hpp"
#include "gpu/mirrored.hpp"
#include "gpu/whole_decode.hpp"
#include "gpu/whole_prefill.hpp"

using namespace nsa;
using namespace nsa::test;

namespace {

LayerShape shape_of(DType type, int d) {
  LayerShape s;
  s.groups = 4;
  s.heads_per_group = 16;
  s.d_k = s.d_v = d;
  s.dtype = type;
  return s;
}

// The number of runs, of `times`, whose `out` differs from that of the first run. `out` is filled with NaN before each.
template <class Whole, class Queue>
int runs_that_differ(Whole& whole, void* out, std::int64_t bytes, int times, Queue queue) {
  const auto size = static_cast<std::size_t>(bytes);
  void* first = whole.memory.make(bytes);
  int differ = 0;
  for (int i = 0; i <= times; ++i) {
    gpu().device->fill(out, 0xFF, size, whole.stream);
    queue();
    if (i == 0) {
      gpu().device->copy(first, out, size, whole.stream);
      continue;
    }
    const Differences found = differences(out, first, size, whole.stream);
    if (found.count > 0 && ++differ == 1)
      UNSCOPED_INFO("run " << i << ": " << found.count << " words differ, the first is " << found.first);
  }
  return differ;
}

}  // namespace

// A context of 8K, where groups run concurrently, and contexts where they run one after the other.
TEST_CASE("a fused prefill gives the same bits every time", "[prefill][repeats]") {
  for (const DType type : {DType::bf16, DType::f16})
    for (const auto& [d, context, times] :
         {std::tuple{64, 8192, 1000}, {128, 8192, 1000}, {64, 32768, 100}, {128, 16384, 200}}) {
      WholePrefill whole(gpu(), shape_of(type, d), context, 0, false);
      INFO("d=" << d << " context=" << context << " type=" << static_cast<int>(type));
      CHECK(runs_that_differ(whole, whole.o, whole.widest.rows() * whole.s.heads() * d * 2, times,
                             [&] { whole.run_fused(); }) == 0);
    }
}

// So few rows that the kernel runs row by row: bulk copies into a ring that warps read with ordinary loads.
TEST_CASE("selected attention row by row gives the same bits every time", "[prefill][repeats]") {
  for (const int d : {64, 128}) {
    WholePrefill whole(gpu(), shape_of(DType::bf16, d), 4096, 192, false);
    const AttendKernel& fused = gpu().kernels->attend[sel][0];
    whole.run(nullptr);
    QueryTile last;
    whole.each_tile([&](const QueryTile& tile, std::int64_t) { last = tile; });
    const AttendArgs a = whole.step(last, whole.T - last.tokens).attend_args(sel);
    INFO("d=" << d << " variant=" << fused.variant_name(a));
    CHECK(std::string(fused.variant_name(a)) == "rows");
    CHECK(runs_that_differ(whole, a.out.o, last.rows() * whole.s.heads() * d * 4, 2000,
                           [&] { fused.run(a, whole.stream); }) == 0);
  }
}

// A decode step in one kernel, on clusters of 16 CTAs per work item to one, and on CTAs of 4 warps, two per SM; with
// more tiles than warps, and with fewer. The memory that CTAs exchange through the L2 is filled with NaN, too.
TEST_CASE("a fused decode step gives the same bits every time", "[step][repeats]") {
  for (const DType type : {DType::bf16, DType::f16})
    for (const auto& [batch, context, d, times] : {std::tuple{1, 1024, 128, 2000},
                                                   {1, 8192, 64, 2000},
                                                   {1, 65536, 128, 3000},
                                                   {2, 131072, 128, 1000},
                                                   {4, 65536, 64, 2000},
                                                   {16, 65536, 128, 1000},
                                                   {32, 16384, 128, 1000},
                                                   {64, 8192, 128, 1000}}) {
      if (type == DType::f16 && batch > 1) continue;
      WholeDecode whole(gpu(), shape_of(type, d), batch, context, 1);
      INFO(batch << " x " << context << " d=" << d << " type=" << static_cast<int>(type));
      const auto fill_nan = [&](void* what, auto bytes) {
        gpu().device->fill(what, 0xFF, static_cast<std::size_t>(bytes), whole.stream);
      };
      const auto run = [&] {
        fill_nan(whole.scores, whole.score_bytes);
        fill_nan(whole.scratch, whole.scratch_bytes);
        fill_nan(whole.selected, whole.selected_bytes());
        whole.run_fused(whole.sets[0]);
      };
      CHECK(runs_that_differ(whole, whole.o, whole.o_bytes(), times, run) == 0);
      CHECK(runs_that_differ(whole, whole.selected, whole.selected_bytes(), times / 10, run) == 0);
    }
}
