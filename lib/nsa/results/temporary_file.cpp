#include "nsa/results/temporary_file.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <ctime>
#include <fstream>

#include "comm/process_id.hpp"
#include "nsa/results/files.hpp"

namespace nsa {
namespace {

constexpr std::time_t dead_after = 600;  // seconds; sealing a point takes a few

/// Advice for a failure during the run: finished points are safe.
constexpr const char* resume_advice = "fix that, then go on with --resume";

/// Whether `name` is "<result>.<host>.<pid>.tmp".
bool is_temporary_name(std::string_view name, std::string_view result, std::string_view& host, int& pid) {
  constexpr std::string_view end = ".tmp";
  if (name.size() <= result.size() + end.size() || !name.starts_with(result) || !name.ends_with(end)) return false;
  name.remove_prefix(result.size());
  name.remove_suffix(end.size());
  const std::size_t dot = name.rfind('.');
  if (name[0] != '.' || dot == 0) return false;
  host = name.substr(1, dot - 1);
  const std::string_view number = name.substr(dot + 1);
  const auto [rest, error] = std::from_chars(number.data(), number.data() + number.size(), pid);
  return error == std::errc() && rest == number.data() + number.size() && pid > 0;
}

/// Whether the process has ended and only waits for its parent to take note: nobody may, in a container without init.
bool is_zombie(int pid) { return process_stat(pid).state == 'Z'; }

bool may_be_alive(std::string_view host, int pid, const std::string& path) {
  if (host == host_name()) return pid != getpid() && (kill(pid, 0) == 0 || errno == EPERM) && !is_zombie(pid);
  struct stat status {};
  return stat(path.c_str(), &status) == 0 && std::time(nullptr) - status.st_mtime < dead_after;
}

/// Whether the content is that of a result file, or of one whose first bytes were never written.
bool has_content_of_result(const std::string& path) {
  std::array<char, 8> begin{};
  std::ifstream(path, std::ios::binary).read(begin.data(), begin.size());
  return is_hdf5(path) || std::ranges::all_of(begin, [](char c) { return c == 0; });
}

void sync_path(const std::string& path, int flags) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC | flags);
  const bool done = file >= 0 && (fsync(file) == 0 || errno == EINVAL);  // EINVAL: a file system that syncs no folders
  const std::string why = std::strerror(errno);
  if (file >= 0) close(file);
  if (!done) file_error("cannot sync " + path, why, resume_advice);
}

}  // namespace

std::string temporary_name(const std::string& path) { return fmt::format("{}.{}.{}.tmp", path, host_name(), getpid()); }

void remove_leftovers(const std::string& path) {
  const std::string folder = parent_of(path), result = path.substr(path.rfind('/') + 1);
  for (const std::string& name : names_in(folder)) {
    std::string_view host;
    int pid = 0;
    const std::string file = folder + "/" + name;
    if (is_temporary_name(name, result, host, pid) && status_of(file).kind == PathStatus::file &&
        has_content_of_result(file) && !may_be_alive(host, pid, file))
      unlink(file.c_str());
  }
}

void copy_to_temporary(const std::string& path, const std::string& temporary) {
  if (const std::string why = copy_file(path, temporary); !why.empty())
    file_error("cannot copy " + path + " to " + temporary, why, resume_advice);
}

void sync_file(const std::string& path) { sync_path(path, 0); }

void publish(const std::string& temporary, const std::string& path, bool replace) {
  if (!replace && link(temporary.c_str(), path.c_str()) == 0) {
    unlink(temporary.c_str());
  } else if (!replace && errno == EEXIST) {
    file_error(path + " exists", "another program has made it since this run began", "choose another --output");
  } else if (rename(temporary.c_str(), path.c_str()) != 0) {  // also where the file system has no hard links
    file_error("cannot rename " + temporary + " to " + path, std::strerror(errno), resume_advice);
  }
  sync_path(parent_of(path), O_DIRECTORY);
}

void write_text_file(const std::string& path, const char* option, const std::string& text) {
  if (path.empty()) return;
  // Written beside the file that is there, which a full disk then leaves as it is.
  const std::string target = follow_links(path), partial = temporary_name(target);
  struct stat earlier {};
  const bool replaces = stat(target.c_str(), &earlier) == 0;
  std::ofstream file(partial);
  file << text << std::flush;
  if (file && (!replaces || chmod(partial.c_str(), earlier.st_mode & 07777) == 0) &&
      rename(partial.c_str(), target.c_str()) == 0)
    return;
  const int error = errno;
  unlink(partial.c_str());
  file_error("cannot write " + path, std::strerror(error), std::string("choose another ") + option);
}

}  // namespace nsa
