// Files that are damaged, locked or another program's: an error names the file and the reason, and nothing crashes.

#include <fcntl.h>
#include <pthread.h>
#include <sys/file.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <ctime>
#include <fstream>
#include <functional>
#include <new>

#include "nsa/results/hdf5/h5.hpp"
#include "nsa/results/schema.hpp"
#include "result_folder.hpp"

using namespace nsa;

TEST_CASE("result file: an error about another file names the file and the reason", "[result]") {
  const Folder folder;
  const std::string path = folder.file("r.h5");
  const auto refused = [&] { return file_error([&] { read_result(path); }); };
  CHECK(contains(refused(), path + " (no such file)"));
  std::ofstream(path) << "not HDF5";
  CHECK(contains(refused(), "file signature not found"));
  fs::remove(path);

  h5::flush_and_close(h5::create_file(path));
  CHECK(contains(refused(), "no result of nsa"));
  const auto edit = [&](auto&& change) {
    h5::Handle file = h5::open_file(path, true);
    change(file);
    h5::flush_and_close(std::move(file));
  };
  for (const char* version : {"2.0", "-1", "x", ""}) {
    edit([&](const h5::Handle& file) { h5::write_attribute(file, "schema_version", version); });
    CHECK(contains(refused(), std::string("schema is '") + version + "'"));
  }
  edit([&](const h5::Handle& file) { h5::write_attribute(file, "schema_version", std::int64_t{1}); });
  CHECK(contains(refused(), "'schema_version' has another type"));
  edit([&](const h5::Handle& file) { h5::write_attribute(file, "schema_version", schema_version); });
  CHECK(contains(refused(), "attribute 'status' is missing"));
  fs::remove(path);

  write_sample(path);
  edit([&](const h5::Handle& file) { h5::write_attribute(file, "schema_version", "1.99"); });
  CHECK(read_result(path).points.size() == 2);  // a later minor only adds
  edit([&](const h5::Handle& file) {
    const h5::Handle point = h5::open_group(file, "points/0001");
    h5::remove(point, "rep");
    h5::write_scale(point, "rep", std::vector<std::int64_t>{0, 1}, {"1", ""});
  });
  CHECK(contains(refused(), "point 0001: 'time' has shape (2, 11, 2, 3), its dimensions (2, 11, 2, 2)"));
}

TEST_CASE("result file: kernels without a column, or with one of another length, are refused by name", "[result]") {
  const Folder folder;
  const std::string path = folder.file("r.h5");
  write_sample(path);
  const auto edit = [&](auto&& change) {
    h5::Handle file = h5::open_file(path, true);
    change(h5::open_group(file, "points/0000/kernels"));
    h5::flush_and_close(std::move(file));
  };
  edit([](const h5::Handle& kernels) { h5::remove(kernels, "mean_abs_err"); });
  CHECK(contains(file_error([&] { read_result(path); }), "point 0000: dataset 'kernels/mean_abs_err' is missing"));
  edit([](const h5::Handle& kernels) {
    h5::write(kernels, "mean_abs_err", std::vector<double>{1, 2, 3}, {"rep"}, {"1", ""});
  });
  CHECK(contains(file_error([&] { read_result(path); }), "'mean_abs_err' has shape (3), its dimensions (2)"));
}

TEST_CASE("result file: a needle's column of another length than the depths is refused by name", "[result]") {
  const Folder folder;
  const std::string path = folder.file("r.h5");
  write_sample(path);
  {
    h5::Handle file = h5::open_file(path, true);
    const h5::Handle needle = h5::open_group(file, "points/0000/needle");
    h5::remove(needle, "found");
    h5::write_scale(needle, "one", counting<std::int64_t>(1, 0), {"1", ""});
    h5::write(needle, "found", std::vector<double>{1}, {"one"}, {"1", ""});
    h5::flush_and_close(std::move(file));
  }
  CHECK(
      contains(file_error([&] { read_result(path); }), "point 0000: dataset 'needle/found' is not one value a depth"));
}

TEST_CASE("result file: a truncated file is an error", "[result]") {
  const Folder folder;
  const std::string path = folder.file("r.h5");
  write_sample(path);
  const std::uintmax_t size = fs::file_size(path);
  for (const std::uintmax_t cut : {std::uintmax_t{0}, std::uintmax_t{7}, size / 4, size / 2, size - 1}) {
    fs::resize_file(path, size);
    fs::resize_file(path, cut);
    CHECK(contains(file_error([&] { read_result(path); }), "cannot read " + path));
  }
}

TEST_CASE("result file: a refused lock names the variable", "[result]") {
  const Folder folder;
  const std::string path = folder.file("r.h5");
  write_sample(path);
  const int file = open(path.c_str(), O_RDWR);
  REQUIRE(flock(file, LOCK_EX) == 0);
  CHECK(contains(file_error([&] { read_result(path); }), "HDF5_USE_FILE_LOCKING=FALSE"));
  close(file);
}

TEST_CASE("files of others are opened by a child first", "[result]") {
  const Folder folder;
  const std::string path = folder.file("r.h5");
  write_sample(path);
  static int forks = 0;
  pthread_atfork(
      nullptr, [] { ++forks; }, nullptr);
  read_result(path);
  CHECK(forks == 1);
  const TensorFile tensors(path);
  CHECK(forks == 2);
}

TEST_CASE("readers of several files run side by side, and none is left behind", "[result]") {
  const Folder folder;
  const std::string path = folder.file("there");
  {
    h5::Sandbox waits([&](const auto&) {
      for (int i = 0; i < 2000 && !fs::exists(path); ++i) usleep(5000);
      return std::string(fs::exists(path) ? "met" : "alone");
    });
    h5::Sandbox arrives([&](const auto&) {
      std::ofstream file(path);
      return std::string("there");
    });
    h5::Sandbox endless([](const auto&) -> std::string {
      for (;;) usleep(1000000);
    });
    CHECK(waits.result() == "met");
    CHECK(arrives.result() == "there");
  }
  CHECK(waitpid(-1, nullptr, WNOHANG) == -1);  // no child
}

TEST_CASE("a file that crashes HDF5, or keeps it busy for ever, is refused", "[result]") {
  const std::string all(100000, 'x');
  const auto reply = [&](const std::function<void(const std::function<void()>&)>& read) {
    return h5::run_sandboxed([&](const std::function<void()>& progress) { return read(progress), all; }, 1);
  };
  const auto refusal = [&](const std::function<void()>& read) -> std::string {
    try {
      return reply([&](const auto&) { read(); }) == all ? "" : "?";
    } catch (const h5::Error& error) {
      return error.what();
    }
  };
  std::atomic<std::int64_t> turns = 0;
  CHECK(refusal([] {}).empty());
  CHECK(refusal([] { throw h5::Error("what it said"); }) == "what it said");
  CHECK(refusal([] { std::raise(SIGSEGV); }) == "damaged: the HDF5 library crashes, signal 11, on it");
  CHECK(refusal([&] {
          while (turns >= 0) ++turns;
        }) == "reading it got no further in 1 s of processor time: it may be damaged");
  CHECK(refusal([] { std::raise(SIGKILL); }).find("too little memory") != std::string::npos);
  CHECK_THROWS_AS(reply([](const auto&) { throw std::bad_alloc(); }), std::bad_alloc);
  const auto work = [&](const std::function<void()>& progress) {  // more than the limit, and never without progress
    for (const std::clock_t end = std::clock() + 3 * CLOCKS_PER_SEC; std::clock() < end; ++turns) progress();
  };
  CHECK(reply(work) == all);
}
