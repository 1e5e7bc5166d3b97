// kind = "kernels": the drawn blocks, the comparison with the oracle, and the detection of a wrong kernel.

#include <algorithm>
#include <cmath>
#include <set>
#include <sstream>

#include "catch.hpp"
#include "kernels/host/runtime/host.hpp"
#include "nsa/report/report.hpp"
#include "nsa/tasks/kernel_bench.hpp"
#include "nsa/verify/shared_blocks.hpp"

using namespace nsa;

namespace {

Config small_config(DType precision = DType::f32) {
  Config c;
  c.kind = TaskKind::kernels;
  c.model.precision = precision;
  c.nsa.w = 70;
  c.kernels.implementations = {"fused", "sdpa", "sdpa_packed", "flash_packed", "sdpa_gemm", "sdpa_gemm_packed",
                               "masked"};
  return c;
}

Point small_point(Branch branch, Spans spans = Spans::mixed) {
  return {640, 1, -1, {branch, branch == sel ? 40 : 0, 4, 16, 4, spans}};
}

struct Bench {
  Bench(const Config& config, const Point& point,
        const KernelTable& kernels = *open_backend(BackendKind::host, 0).kernels)
      : device(*open_backend(BackendKind::host, 0).device),
        stream(device.create_stream()),
        bench(Allocator{device, account}, kernels, config, point) {
    bench.fill(stream);
  }
  ~Bench() { device.destroy_stream(stream); }
  KernelError error_of(const KernelChoice& choice, std::int64_t copy = 0) {
    bench.clear(stream);
    bench.run(choice, copy, stream);
    return kernel_error(bench.output(stream), bench.oracle(stream, 2));
  }
  MemoryAccount account;
  const DeviceOps& device;
  Stream* stream;
  KernelBench bench;
};

const AttendKernel* real_sel = nullptr;

/// One output of one head is off by 0.01.
void slightly_wrong(const AttendArgs& args, Stream* stream) {
  real_sel->run(args, stream);
  args.out.o[args.shape.d_v] += 0.01f * args.out.ms[3];
}

}  // namespace

TEST_CASE("kernels: blocks are drawn by their span, the same on every draw", "[kernels]") {
  constexpr std::int32_t n = 8;
  constexpr std::int64_t blocks = 100, rows = 50;
  for (const Spans spans : {Spans::contiguous, Spans::mixed, Spans::scattered}) {
    const std::vector<std::int32_t> chosen = choose_blocks(spans, rows, n, blocks, 1);
    CHECK(chosen == choose_blocks(spans, rows, n, blocks, 1));
    CHECK(chosen != choose_blocks(spans, rows, n, blocks, 2));
    REQUIRE(chosen.size() == rows * n);
    std::int64_t neighbours = 0;
    std::set<std::int32_t> firsts;
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::int32_t* of = chosen.data() + row * n;
      firsts.insert(of[0]);
      CHECK(of[0] >= 0);
      CHECK(of[n - 1] < blocks);
      for (int i = 1; i < n; ++i) {
        CHECK(of[i] > of[i - 1]);
        neighbours += of[i] == of[i - 1] + 1;
      }
    }
    CHECK(firsts.size() > 10);  // rows draw independently
    if (spans == Spans::contiguous) CHECK(neighbours == rows * (n - 1));
    if (spans == Spans::mixed) CHECK((neighbours >= rows * (n / 2 - 1) && neighbours < rows * (n - 2)));
    if (spans == Spans::scattered) CHECK(neighbours < rows * 2);
  }
  CHECK(choose_blocks(Spans::scattered, 1, 4, 4, 1) == std::vector<std::int32_t>{0, 1, 2, 3});
}

TEST_CASE("kernels: rows repeat the one before as often as run.overlap says", "[kernels]") {
  constexpr std::int32_t n = 8;
  constexpr std::int64_t blocks = 1000, rows = 4000;
  const auto shared = [](const std::vector<std::int32_t>& chosen) {
    SharedBlocks all;
    all.add(chosen.data(), rows, 1, n);
    return all.mean();
  };
  CHECK(choose_blocks(Spans::mixed, rows, n, blocks, 1, 0) == choose_blocks(Spans::mixed, rows, n, blocks, 1));
  CHECK(shared(choose_blocks(Spans::scattered, rows, n, blocks, 1, 0)) == Approx(0.008).epsilon(0.2));  // n / blocks
  for (const double overlap : {0.25, 0.5, 0.9})  // and 0.008 of the rest; four standard errors of 4000 draws
    CHECK(shared(choose_blocks(Spans::scattered, rows, n, blocks, 1, overlap)) ==
          Approx(overlap + 0.008 * (1 - overlap)).margin(4 * std::sqrt(overlap * (1 - overlap) / rows)));
  CHECK(shared(choose_blocks(Spans::contiguous, rows, n, blocks, 1, 1)) == 1);
}

TEST_CASE("kernels: shared blocks are counted list by list", "[kernels]") {
  // Two lists of four blocks, three queries; the later query's blocks count.
  const std::vector<std::int32_t> selected = {0, 1, 2, 3,  0, 5, -1, -1,   //
                                              0, 2, 4, 6,  0, 1, 5,  -1,   //
                                              7, 8, 9, 10, 0, 1, 5,  11};  //
  SharedBlocks shared;
  shared.add(selected.data(), 3, 2, 4);
  CHECK(shared.pairs == 4);
  CHECK(shared.shares == Approx(2.0 / 4 + 2.0 / 3 + 0 + 3.0 / 4));
  SharedBlocks one;
  one.add(selected.data(), 1, 2, 4);
  CHECK(std::isnan(one.mean()));
}

TEST_CASE("kernels: variant() names the kernel that the arguments select", "[kernels]") {
  const AttendKernel by_rows{
      "fused", nullptr, nullptr,
      nullptr, nullptr, [](const AttendArgs& a) { return a.tile.rows() > 39 && a.selected && a.q ? "tiled" : "rows"; }};
  Bench few(small_config(), {640, 1, -1, {sel, 39, 4, 16, 4, Spans::mixed}}), many(small_config(), small_point(sel));
  CHECK(few.bench.variant({"fused", &by_rows, false}) == "rows");
  CHECK(many.bench.variant({"fused", &by_rows, false}) == "tiled");
}

TEST_CASE("kernels: every implementation is correct on every branch and reads the expected tokens", "[kernels]") {
  for (const DType precision : {DType::f32, DType::bf16})
    for (const Branch branch : {cmp, sel, win}) {
      const Config config = small_config(precision);
      const Point point = small_point(branch);
      Bench b(config, point);
      const std::vector<KernelChoice> choices =
          kernel_choices(*open_backend(BackendKind::host, 0).kernels, config, point);
      REQUIRE(choices.size() == (branch == sel ? 7u : branch == win ? 4u : 3u));
      for (const KernelChoice& choice : choices) {
        INFO(branch_names[branch] << " " << choice.label);
        const KernelError error = b.error_of(choice, b.bench.copies() - 1);  // all copies have the same values
        CHECK(error.largest < 1e-5);  // fp32 accumulation over 256 values of order one
        CHECK(error.mean < error.largest);
        CHECK(b.bench.reads(b.stream) == b.bench.expected_reads_total());
        CHECK(b.bench.variant(choice) == choice.kernel->name);  // on the host each implementation is one kernel
      }
    }
  Bench b(small_config(), small_point(sel));
  CHECK(b.bench.expected_reads_total() == 40 * 4 * 64);
  CHECK(b.bench.copies() == 64);
  Config warm = small_config();
  warm.kernels.cold = false;
  CHECK(Bench(warm, small_point(sel)).bench.copies() == 1);
}

TEST_CASE("kernels: one wrong output raises the errors", "[kernels]") {
  const Config config = small_config();
  Bench b(config, small_point(sel));
  KernelChoice choice = kernel_choices(*open_backend(BackendKind::host, 0).kernels, config, small_point(sel)).at(0);
  const KernelError right = b.error_of(choice);
  real_sel = choice.kernel;
  const AttendKernel wrong{"fused", real_sel->accepts, slightly_wrong};
  choice.kernel = &wrong;
  const KernelError error = b.error_of(choice);
  CHECK(error.largest == Approx(0.01).epsilon(1e-3));
  CHECK(error.mean == Approx(right.mean + 0.01 / (40 * 4 * 16)).epsilon(1e-2));
}

TEST_CASE("kernels: mean, standard error and largest error of known outputs", "[kernels]") {
  const KernelError e = kernel_error({1.0f, 2.0f, 3.0f, 4.0f}, {{1.0, 2.5, 3.0, 5.5}, {0.1, 0.5}});
  CHECK(e.mean == Approx(0.5));  // rows 0.25 and 0.75
  CHECK(e.standard_error == Approx(0.25));
  CHECK(e.largest == Approx(1.5));
  CHECK(e.excess == Approx(5));  // 0.5 of a bound of 0.1; 1.5 of 0.5 is less
  const KernelError none = kernel_error({std::nanf("")}, {{0.0}, {1.0}});
  CHECK(std::isinf(none.largest));
  CHECK(std::isinf(none.excess));
}

TEST_CASE("kernels: planned memory equals used memory", "[kernels]") {
  for (const Branch branch : {cmp, sel, win}) {
    MemoryAccount planned;
    KernelBench(Allocator{dry_device(), planned}, *open_backend(BackendKind::host, 0).kernels, small_config(),
                small_point(branch));
    CHECK(Bench(small_config(), small_point(branch)).account.total_peak == planned.total_peak);
  }
}

TEST_CASE("kernels: the sweep, its parameters and its names", "[kernels]") {
  Config c = small_config();
  c.run.context = {640};
  c.kernels.branch = {sel, win};
  c.kernels.rows = {40};
  c.kernels.heads = {4, 8};
  c.kernels.blocks = {2, 4};
  c.kernels.spans = {Spans::contiguous, Spans::scattered};
  const std::vector<Point> points = sweep(c);
  REQUIRE(points.size() == 8 + 2);  // win has neither blocks nor spans
  PointRecord p;
  p.parameters = parameters(c, points[7]);
  CHECK(kernel_point_name(p) == "sel_N40_H8_D64_n4_scattered_context_640");
  p.parameters = parameters(c, points[8]);
  CHECK(kernel_point_name(p) == "win_N40_H4_D64_context_640");
}

TEST_CASE("kernels: the guard is the length from which flash is fast enough", "[kernels][report]") {
  const auto point = [](const char* branch, std::int64_t context, double speed) {
    PointRecord p;
    p.parameters = {{"task.kind", "kernels"}, {"kernels.branch", branch}, {"run.context", context}};
    p.kernels.implementations = {"flash", "sdpa"};
    p.kernels.ranks = 1;
    p.kernels.reps = 10;
    p.kernels.seconds.assign(10, 1e-5);
    p.kernels.seconds.insert(p.kernels.seconds.end(), 10, speed * 1e-5);
    return p;
  };
  const std::vector<PointRecord> records = {point("win", 128, 2.0),  point("win", 256, 1.1), point("win", 512, 1.3),
                                            point("win", 1024, 2.0), point("cmp", 128, 3.0), point("cmp", 256, 1.19)};
  std::vector<const PointRecord*> points;
  for (const PointRecord& p : records) points.push_back(&p);
  std::ostringstream out;
  print_guards(out, points);
  CHECK(out.str().find("fa2_min_len_win = 512  # at least 1.2x from 512 to 1024") != std::string::npos);
  CHECK(out.str().find("fa2_min_len_cmp = 999999  # below 1.2x at 256") != std::string::npos);
  PointRecord noisy = point("win", 512, 0.5);
  noisy.noisy = {"flash: the median moved"};
  points[2] = &noisy;
  std::ostringstream without;
  print_guards(without, points);
  CHECK(without.str().find("flash over sdpa, win: NOISY, and left out: 512\n") == 0);
  CHECK(without.str().find("fa2_min_len_win = 1024  # at least 1.2x from 1024 to 1024") != std::string::npos);
  points.clear();
  std::ostringstream none;
  print_guards(none, points);
  CHECK(none.str().empty());
}
