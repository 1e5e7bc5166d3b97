// The result file: the reader returns what the writer wrote, and a file under its final name is always complete. Files
// that are not such: test_damaged_results.cpp.

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>

#include "catch.hpp"
#include "kernels/diagnostics/error.hpp"
#include "nsa/results/hdf5/h5.hpp"
#include "nsa/results/schema.hpp"
#include "result_folder.hpp"

using namespace nsa;

namespace {

template <class T>
void check_same(const std::vector<T>& a, const std::vector<T>& b) {
  REQUIRE(a.size() == b.size());
  CHECK((a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0));  // NaN too
}

void check_same(const PointRecord& a, const PointRecord& b) {
  CHECK(a.index == b.index);
  CHECK(a.parameters == b.parameters);
  CHECK(a.valid == b.valid);
  for (const auto& entry : point_texts) CHECK(a.*entry.field == b.*entry.field);
  for (const auto& entry : point_integers) CHECK(a.*entry.field == b.*entry.field);
  for (const auto& entry : point_reals) CHECK(a.*entry.field == b.*entry.field);
  CHECK(a.routes == b.routes);
  CHECK(a.route_kernels == b.route_kernels);
  CHECK(a.exchange == b.exchange);
  CHECK(a.blocks_shared == b.blocks_shared);
  for (const auto& entry : chunk_texts) CHECK(a.chunk.*entry.field == b.chunk.*entry.field);
  for (const auto& entry : quantisation_reals) CHECK(a.quantisation.*entry.field == b.quantisation.*entry.field);
  CHECK(a.fallbacks == b.fallbacks);
  CHECK(a.time.modes == b.time.modes);
  CHECK(a.time.ranks == b.time.ranks);
  CHECK(a.time.reps == b.time.reps);
  check_same(a.time.seconds, b.time.seconds);
  CHECK(a.phases.phases == b.phases.phases);
  CHECK(a.phases.ranks == b.phases.ranks);
  CHECK(a.phases.reps == b.phases.reps);
  check_same(a.phases.seconds, b.phases.seconds);
  CHECK(a.reads.ranks == b.reads.ranks);
  CHECK(a.reads.steps == b.reads.steps);
  check_same(a.reads.counted, b.reads.counted);
  check_same(a.reads.expected, b.reads.expected);
  check_same(a.reads.nsa_vibe, b.reads.nsa_vibe);
  check_same(a.bytes, b.bytes);
  CHECK(a.memory.kinds == b.memory.kinds);
  check_same(a.memory.planned, b.memory.planned);
  check_same(a.memory.measured_peak, b.memory.measured_peak);
  check_same(a.memory.process_peak, b.memory.process_peak);
  CHECK(a.noisy == b.noisy);
  CHECK(a.noise.modes == b.noise.modes);
  CHECK(a.noise.ranks == b.noise.ranks);
  for (const auto& entry : noise_reals) check_same(a.noise.*entry.field, b.noise.*entry.field);
  for (const auto& entry : noise_counts) check_same(a.noise.*entry.field, b.noise.*entry.field);
  for (const auto& entry : noise_counts_1_6) check_same(a.noise.*entry.field, b.noise.*entry.field);
  check_same(a.noise.sm_clock_max_mhz, b.noise.sm_clock_max_mhz);
  check_same(a.noise.cache_bytes, b.noise.cache_bytes);
  CHECK(a.needle == b.needle);
  CHECK(a.kernels.implementations == b.kernels.implementations);
  CHECK(a.kernels.ranks == b.kernels.ranks);
  CHECK(a.kernels.reps == b.kernels.reps);
  CHECK(a.kernels.seconds == b.kernels.seconds);
  CHECK(a.kernels.mean_abs_err == b.kernels.mean_abs_err);
  CHECK(a.kernels.max_abs_err == b.kernels.max_abs_err);
  CHECK(a.kernels.mean_abs_err_se == b.kernels.mean_abs_err_se);
  CHECK(a.kernels.variants == b.kernels.variants);
  CHECK(a.pages.caches == b.pages.caches);
  CHECK(a.pages.ranks == b.pages.ranks);
  for (const auto& column : page_columns) CHECK(a.pages.*column.field == b.pages.*column.field);
  CHECK(a.batch.lengths == b.batch.lengths);
  CHECK(a.tokens_kept == b.tokens_kept);
  CHECK(a.batch.reads == b.batch.reads);
  CHECK(a.batch.reads_expected == b.batch.reads_expected);
  CHECK(a.batch.length_imbalance == b.batch.length_imbalance);
  CHECK(a.batch.schedule_imbalance == b.batch.schedule_imbalance);
}

}  // namespace

TEST_CASE("result file: every field is read back", "[result]") {
  const Folder folder;
  const std::string path = folder.file("r.h5");
  write_sample(path);
  const ResultFile result = read_result(path);
  REQUIRE(result.points.size() == 2);
  check_same(result.points[0], sample_point(0));
  check_same(result.points[1], sample_point(1));

  const RunRecord run = sample_run();
  CHECK(result.run.status == "complete");
  for (const auto& entry : run_attributes) CHECK(result.run.*entry.field == run.*entry.field);
  for (const auto& entry : run_attributes_1_6) CHECK(result.run.*entry.field == run.*entry.field);
  for (const auto& entry : run_attributes_1_5) CHECK(result.run.*entry.field == run.*entry.field);
  REQUIRE(result.run.system.size() == run.system.size());
  for (std::size_t r = 0; r < run.system.size(); ++r) {
    for (const auto& entry : system_texts) CHECK(result.run.system[r].*entry.field == run.system[r].*entry.field);
    for (const auto& entry : system_clocks) CHECK(result.run.system[r].*entry.field == run.system[r].*entry.field);
    for (const auto& entry : system_counts) CHECK(result.run.system[r].*entry.field == run.system[r].*entry.field);
    for (const auto& entry : system_texts_1_2) CHECK(result.run.system[r].*entry.field == run.system[r].*entry.field);
    for (const auto& entry : system_counts_1_2) CHECK(result.run.system[r].*entry.field == run.system[r].*entry.field);
  }
}

TEST_CASE("result file: a point that fills no table is read back", "[result]") {
  const Folder folder;
  PointRecord bare;
  bare.parameters = {{"task.kind", "needle"}};
  {
    ResultWriter writer(folder.file("r.h5"), RunRecord{}, 0);
    writer.seal(bare);
  }
  const ResultFile result = read_result(folder.file("r.h5"));
  REQUIRE(result.points.size() == 1);
  check_same(result.points[0], bare);
  CHECK(result.run.status == "running");
}

TEST_CASE("result file: appears with its first point, whole after each, alone at the end", "[result]") {
  const Folder folder;
  const std::string path = folder.file("r.h5");
  {
    ResultWriter writer(path, sample_run(), 0);
    CHECK_FALSE(fs::exists(path));
    for (std::int64_t i = 0; i < 3; ++i) {
      writer.seal(sample_point(i));
      const ResultFile result = read_result(path);
      CHECK(result.run.status == "running");
      CHECK(result.points.size() == static_cast<std::size_t>(i + 1));
    }
    RunRecord interrupted = sample_run();
    interrupted.status = "interrupted";
    interrupted.end = "later";
    interrupted.system[0].clock_mhz_after = 99;
    writer.finish(interrupted);
  }
  CHECK(folder.list() == std::vector<std::string>{"r.h5"});
  const ResultFile result = read_result(path);
  CHECK(result.run.status == "interrupted");
  CHECK(result.run.end == "later");
  CHECK(result.run.system[0].clock_mhz_after == 99);
  CHECK(result.points.size() == 3);
}

TEST_CASE("result file: a run without a point leaves nothing", "[result]") {
  const Folder folder;
  {
    ResultWriter writer(folder.file("r.h5"), sample_run(), 0);
    writer.finish(sample_run());
  }
  CHECK(folder.list().empty());
}

// Between a write and the rename, or anywhere else: 200 kills over the time that a run of four points takes.
TEST_CASE("result file: after a kill at any moment it is absent or complete, and a run resumes it", "[result]") {
  const Folder folder;
  const int rounds = std::getenv("NSA_TEST_ALL") ? 200 : 100;  // ./test.sh --all
  constexpr std::int64_t points = 4;
  const auto began = std::chrono::steady_clock::now();
  write_sample(folder.file("whole.h5"), points);
  const auto duration = std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - began);
  std::mt19937 random(1);
  std::uniform_int_distribution<useconds_t> moment(0, static_cast<useconds_t>(duration.count()));
  int killed_with_points = 0, killed_while_sealing = 0;
  for (int round = 0; round < rounds; ++round) {
    const std::string path = folder.file("r" + std::to_string(round) + ".h5");
    const pid_t child = fork();
    if (child == 0) {
      try {
        write_sample(path, points);
      } catch (...) {
      }
      _exit(0);
    }
    usleep(moment(random));
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
    std::int64_t sealed = 0;
    if (fs::exists(path)) {
      const ResultFile result = read_result(path);
      sealed = static_cast<std::int64_t>(result.points.size());
      REQUIRE(sealed > 0);
      for (std::int64_t i = 0; i < sealed; ++i) check_same(result.points[static_cast<std::size_t>(i)], sample_point(i));
      killed_with_points += result.run.status == "running";
    }
    killed_while_sealing += folder.list().size() > 1 + (sealed > 0);
    if (round % 5 != 0) {  // the rest takes longer
      for (const std::string& name : folder.list()) {
        if (name != "whole.h5") fs::remove(folder.file(name));
      }
      continue;
    }
    ResultWriter writer(path, sample_run(), 0, true);
    for (std::int64_t i = sealed; i < points; ++i) writer.seal(sample_point(i));
    writer.finish(sample_run());
    const ResultFile result = read_result(path);
    CHECK(result.run.status == "complete");
    REQUIRE(result.points.size() == points);
    for (std::int64_t i = 0; i < points; ++i) check_same(result.points[static_cast<std::size_t>(i)], sample_point(i));
    CHECK(folder.list().size() == 2);  // no copy is left
    fs::remove(path);
  }
  CHECK(killed_with_points > rounds / 5);
  CHECK(killed_while_sealing > rounds / 10);
}

TEST_CASE("result file: a point that was cut short is replaced", "[result]") {
  const Folder folder;
  const std::string path = folder.file("r.h5");
  {
    ResultWriter writer(path, sample_run(), 0);
    writer.seal(sample_point(0));
    PointRecord cut = sample_point(1);
    cut.stop_reason = "interrupted";
    cut.time = {{"total"}, 2, 1, counting(stage_count * 2, 1.0)};
    writer.seal(cut);
  }
  {
    ResultWriter writer(path, sample_run(), 0, true);
    writer.seal(sample_point(1));
    CHECK(read_result(path).run.status == "running");
    writer.finish(sample_run());
  }
  const ResultFile result = read_result(path);
  REQUIRE(result.points.size() == 2);
  check_same(result.points[1], sample_point(1));
}

TEST_CASE("result file: a full disk leaves the points before", "[result]") {
  const Folder folder;
  const std::string path = folder.file("r.h5");
  const pid_t child = fork();  // its limit, and what HDF5 could not write, die with it
  if (child == 0) {
    bool refused = false;
    signal(SIGXFSZ, SIG_IGN);
    ResultWriter writer(path, sample_run(), 0);
    writer.seal(sample_point(0));
    const rlimit limit{fs::file_size(path) + 1000, RLIM_INFINITY};
    setrlimit(RLIMIT_FSIZE, &limit);
    try {
      writer.seal(sample_point(1));
    } catch (const UserError& error) {
      refused = error.code() == ExitCode::file && contains(error.what(), path);
    }
    _exit(refused ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  CHECK(status == 0);
  CHECK(read_result(path).points.size() == 1);
}

TEST_CASE("result file: what cannot be written is refused before anything is computed", "[result]") {
  const Folder folder;
  const auto refused = [](const std::string& path, std::size_t bytes = 0) {
    return file_error([&] { ResultWriter(path, sample_run(), bytes); });
  };
  std::ofstream(folder.file("taken.h5")) << "mine";
  CHECK(contains(refused(folder.file("taken.h5")), "taken.h5 exists (results are never overwritten); choose another"));
  CHECK(contains(refused(folder.file("none/r.h5")), "no folder"));
  CHECK(contains(refused(folder.file("taken.h5/r.h5")), "is not a folder"));
  CHECK(contains(refused(folder.path), "it is a folder"));
  CHECK(contains(refused(folder.file("r.h5"), std::size_t{1} << 60), "are free); make room"));
  fs::create_symlink("nowhere", folder.file("dangling.h5"));
  CHECK(contains(refused(folder.file("dangling.h5")), "exists"));
  CHECK(contains(refused("/proc/r.h5"), "cannot write /proc/r.h5"));
  if (geteuid() != 0) {  // root may write everywhere
    fs::permissions(folder.path, fs::perms::owner_read | fs::perms::owner_exec);
    CHECK(contains(refused(folder.file("r.h5")), "Permission denied"));
    fs::permissions(folder.path, fs::perms::owner_all);
  }
  CHECK(folder.list().size() == 2);  // and nothing is left behind
}

TEST_CASE("result file: a file that another run made meanwhile stays", "[result]") {
  const Folder folder;
  const std::string path = folder.file("r.h5");
  ResultWriter writer(path, sample_run(), 0);
  std::ofstream(path) << "mine";
  CHECK(contains(file_error([&] { writer.seal(sample_point(0)); }), "another program has made it"));
  CHECK(fs::file_size(path) == 4);
}

TEST_CASE("tensor file: a dump is read back slab by slab", "[result]") {
  const Folder folder;
  const std::string path = folder.file("r.h5");
  write_sample(path);
  const TensorFile tensors(path);
  CHECK(tensors.has("x"));
  CHECK(tensors.has("weights/w_q"));
  CHECK_FALSE(tensors.has("weights/layer0/w_q"));
  CHECK(tensors.shape("weights/w_o") == std::vector<std::int64_t>{4, 2});
  CHECK(tensors.shape("k_cmp_tokens") == std::vector<std::int64_t>{1, 0, 4});
  CHECK(tensors.read("x", {1, 5, 4}, {0, 1, 2}, {1, 2, 2}) == std::vector<float>{6.5f, 7.5f, 10.5f, 11.5f});
  CHECK(tensors.read("x", {1, 5, 4}, {0, 0, 0}, {1, 0, 4}).empty());
}

TEST_CASE("tensor file: another program's file, in double, under the root", "[result]") {
  const Folder folder;
  const std::string path = folder.file("in.h5");
  const auto refused = [&](auto&& work) {
    const std::string message = file_error(work);
    CHECK(contains(message, path));
    CHECK(contains(message, "make_input.py"));
    return message;
  };
  CHECK(contains(refused([&] { TensorFile{path}; }), "no such file"));
  {
    const h5::Handle file = h5::create_file(path);
    h5::write_scale(file, "row", counting<std::int64_t>(3, 0), {"1", ""});
    h5::write_scale(file, "dim", counting<std::int64_t>(2, 0), {"1", ""});
    h5::write(file, "x", std::vector<double>{1, 2, 0.1, 1e300, 5, std::nan("")}, {"row", "dim"}, {"1", ""});
  }
  const TensorFile tensors(path);
  const std::vector<std::int64_t> shape{3, 2};
  CHECK(tensors.read("x", shape, {0, 0}, {2, 1}) == std::vector<float>{1.0f, 0.1f});
  CHECK(contains(refused([&] { tensors.read("x", shape, {1, 0}, {2, 2}); }), "'x' is inf at [1, 1], as a 32-bit"));
  CHECK(contains(refused([&] { tensors.read("x", shape, {2, 0}, {1, 2}); }), "'x' is nan at [2, 1]"));
  CHECK(contains(refused([&] { tensors.read("x", {3, 4}, {0, 0}, {1, 1}); }), "shape [3, 2], this input needs [3, 4]"));
  CHECK(contains(refused([&] { tensors.shape("weights/w_q"); }), "no tensor 'weights/w_q'"));
  CHECK(contains(refused([&] { tensors.shape("row"); }), "'row' is not floating point"));
}

TEST_CASE("points of a large file that wait for each other are all sealed at the end, whatever ends the run",
          "[result]") {
  const Folder folder;
  for (const bool finished : {true, false}) {
    const std::string path = folder.file(finished ? "finished.h5" : "failed.h5");
    const auto write = [&] {
      ResultWriter writer(path, sample_run(), 0);
      for (std::int64_t i = 0; i < 12; ++i) {
        PointRecord point = sample_point(i);
        if (i == 0) {  // 10 MB: sealing copies them
          point.time.reps = 10'000'000 / 8 / (std::ssize(point.time.modes) * stage_count * point.time.ranks);
          point.time.seconds.assign(
              static_cast<std::size_t>(std::ssize(point.time.modes) * stage_count * point.time.ranks * point.time.reps),
              1e-6);
        }
        writer.seal(point);
      }
      if (!finished) throw UserError("another point failed");
      writer.finish(sample_run());
    };
    if (finished)
      write();
    else
      CHECK_THROWS_AS(write(), UserError);
    const ResultFile file = read_result(path);
    REQUIRE(file.points.size() == 12);
    for (std::int64_t i = 1; i < 12; ++i) check_same(file.points[static_cast<std::size_t>(i)], sample_point(i));
    CHECK(file.run.status == (finished ? "complete" : "running"));
  }
}
