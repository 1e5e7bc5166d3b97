// Names of files, and the memory that the control groups leave.

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <string>

#include "catch.hpp"
#include "comm/process_id.hpp"
#include "kernels/diagnostics/error.hpp"
#include "kernels/host/runtime/limits.hpp"
#include "nsa/results/error_bound.hpp"
#include "nsa/results/files.hpp"
#include "nsa/results/temporary_file.hpp"

using namespace nsa;

namespace {

/// A folder that is removed with its content.
struct Folder {
  std::string path;
  Folder() {
    char name[] = "/tmp/nsa-files-XXXXXX";
    path = mkdtemp(name);
  }
  ~Folder() { (void)!std::system(("rm -r " + path).c_str()); }
  std::string write(const std::string& name, const std::string& text) const {
    std::ofstream(path + "/" + name) << text;
    return path + "/" + name;
  }
};

}  // namespace

TEST_CASE("files: a path is another one by device and inode, or by name where nothing is yet", "[files]") {
  const Folder folder;
  const std::string a = folder.write("a", "text");
  const auto at = [&](const std::string& name) { return folder.path + "/" + name; };
  REQUIRE(symlink("a", at("link").c_str()) == 0);
  REQUIRE(symlink("link", at("second").c_str()) == 0);
  REQUIRE(link(a.c_str(), at("hard").c_str()) == 0);
  REQUIRE(symlink("new", at("to_new").c_str()) == 0);
  REQUIRE(symlink("loop", at("loop").c_str()) == 0);
  for (const char* same : {"a", "./a", "link", "second", "hard"}) CHECK(same_file(a, at(same)));
  CHECK(same_file(at("new"), at("to_new")));
  CHECK(same_file(at("new"), at("./new")));
  CHECK_FALSE(same_file(at("new"), at("other")));
  CHECK_FALSE(same_file(a, at("new")));
  CHECK_FALSE(same_file(at("new"), folder.path + "/none/new"));
  CHECK(follow_links(at("to_new")) == folder.path + "/new");
  CHECK(follow_links(at("loop")) == at("loop"));
  CHECK(why_no_file(at(std::string(300, 'x'))) == "File name too long");
  CHECK(why_no_file(at("new")) == "no such file");
  CHECK(why_no_file(a).empty());
  CHECK(why_no_file(folder.path) == "it is a folder");
  CHECK(why_no_file("/dev/null") == "not a plain file");
}

TEST_CASE("files: what killed runs left is removed, and nothing else", "[files]") {
  const Folder folder;
  const std::string result = folder.path + "/r.h5", host = host_name();
  const std::string hdf5("\x89HDF\r\n\x1a\n", 8), dead = ".4194303.tmp";  // above the largest pid
  const auto old = [](const std::string& path) {
    const timespec times[2] = {{0, UTIME_OMIT}, {1, 0}};
    REQUIRE(utimensat(AT_FDCWD, path.c_str(), times, 0) == 0);
  };
  const std::string left = folder.write("r.h5." + host + dead, hdf5);
  const std::string unwritten = folder.write("r.h5." + host + ".4194302.tmp", "");
  const std::string elsewhere = folder.write("r.h5.node7.12.tmp", hdf5);
  old(elsewhere);
  const std::string kept[] = {
      folder.write("r.h5.notes.tmp", "text"), folder.write("r.h5." + host + ".4194301.tmp", "text"),
      folder.write("r.h5." + host + "." + std::to_string(getppid()) + ".tmp", hdf5),  // a live process
      folder.write("r.h5.node7.13.tmp", hdf5),                                        // perhaps one
      folder.write("other.h5." + host + dead, hdf5)};
  remove_leftovers(result);
  for (const std::string& path : {left, unwritten, elsewhere}) CHECK(status_of(path).kind == PathStatus::missing);
  for (const std::string& path : kept) CHECK(status_of(path).kind == PathStatus::file);
}

TEST_CASE("files: a process is told by its state, its start and its name, which may hold anything", "[files]") {
  std::string fields = ") Z";
  for (int field = 4; field <= 52; ++field) fields += " " + std::to_string(field);
  const ProcessStat stat = parse_process_stat("123 (a) Z (b" + fields + "\n");
  CHECK(stat.name == "a) Z (b");
  CHECK(stat.state == 'Z');
  CHECK(stat.start_time == "22");
  CHECK(parse_process_stat("").start_time == "?");

  const ProcessStat own = process_stat(getpid());
  CHECK(own.name == "unit_tests");
  CHECK(own.start_time == own_process_id().start_time);
  CHECK(std::stoll(own.start_time) > 0);
  CHECK(process_stat(1 << 30).state == '?');
}

TEST_CASE("limits: the least that a control group or one above it leaves", "[files]") {
  const Folder mount;
  const auto group = [&](const std::string& path, const std::string& limit, const std::string& usage,
                         const std::string& stat) {
    REQUIRE(std::system(("mkdir -p " + mount.path + "/" + path).c_str()) == 0);
    const bool second = path.rfind("memory", 0) != 0;
    mount.write(path + (second ? "/memory.max" : "/memory.limit_in_bytes"), limit);
    mount.write(path + (second ? "/memory.current" : "/memory.usage_in_bytes"), usage);
    mount.write(path + "/memory.stat", stat);
  };
  group("job", "1000\n", "700\n", "anon 600\ninactive_file 50\n");
  group("job/step", "max\n", "10\n", "");
  group("memory/old", "900\n", "100\n", "cache 5\ntotal_inactive_file 20\n");
  CHECK(host::free_in_groups("0::/job/step\n", mount.path) == 350);
  CHECK(host::free_in_groups("3:cpu,memory:/old\n0::/none\n", mount.path) == 820);
  CHECK(host::free_in_groups("3:cpu:/old\n0::/\n", mount.path) == -1);
  CHECK(host::free_in_groups("", mount.path) == -1);
  CHECK(host::free_memory().shared > 0);
  mount.write("job/cpu.max", "250000 100000\n");
  mount.write("job/step/cpu.max", "max 100000\n");
  CHECK(host::cores_in_groups("0::/job/step\n", mount.path) == 3);
  CHECK(host::cores_in_groups("0::/none\n", mount.path) == 0);
}

TEST_CASE("the bound of an error grows with the values and with the scores", "[files]") {
  for (const DType type : {DType::f32, DType::bf16, DType::f16}) {
    const double at_one = error_bound(type, 4.5);  // of N(0, 1): not more than 1e-4 and 2e-2
    CHECK(at_one < (type == DType::f32 ? 1e-4 : 2e-2));
    CHECK(error_bound(type, 4.5e5) == Approx(1e5 * at_one).epsilon(1e-3));
    CHECK(error_bound(type, 4.5e-6) < 1e-5 * at_one);
    CHECK(error_bound(type, 4.5, 256) > at_one);
    CHECK(error_bound(type, 0) > 0);
  }
}
