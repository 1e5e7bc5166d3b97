#include "nsa/results/files.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <climits>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string_view>

#include "kernels/diagnostics/error.hpp"

namespace nsa {
namespace {

std::string_view name_in_folder(std::string_view path) { return path.substr(path.rfind('/') + 1); }  // npos + 1 = 0

/// Why a text file cannot be written there; "" if it can.
std::string why_not_written(const std::string& path) {
  const PathStatus status = status_of(path);
  if (status.kind == PathStatus::folder) return "it is a folder";
  if (status.kind == PathStatus::other) return "not a plain file";
  if (status.kind == PathStatus::missing)
    return status.error == ENOENT || status.error == ENOTDIR ? why_not_writable(parent_of(follow_links(path)))
                                                             : std::strerror(status.error);
  if (is_hdf5(path)) return "it is an HDF5 file";
  return access(path.c_str(), W_OK) == 0 ? "" : std::strerror(errno);
}

}  // namespace

void file_error(const std::string& problem, const std::string& why, const std::string& advice) {
  throw UserError(problem + " (" + why + "); " + advice, ExitCode::file);
}

PathStatus status_of(const std::string& path) {
  struct stat status {};
  if (stat(path.c_str(), &status) != 0) return {PathStatus::missing, errno};
  if (S_ISDIR(status.st_mode)) return {PathStatus::folder};
  return {S_ISREG(status.st_mode) ? PathStatus::file : PathStatus::other};
}

std::string why_no_file(const std::string& path) {
  const PathStatus status = status_of(path);
  if (status.kind == PathStatus::folder) return "it is a folder";
  if (status.kind == PathStatus::other) return "not a plain file";
  return status.error == ENOENT ? "no such file" : status.error != 0 ? std::strerror(status.error) : "";
}

std::string parent_of(const std::string& path) {
  const std::size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
}

std::string why_not_writable(const std::string& folder) {
  struct stat status {};
  if (stat(folder.c_str(), &status) != 0)
    return errno == ENOENT ? "no folder " + folder : folder + ": " + std::strerror(errno);
  if (!S_ISDIR(status.st_mode)) return folder + " is not a folder";
  if (status.st_nlink == 0) return "the folder " + folder + " was removed";
  return access(folder.c_str(), W_OK | X_OK) == 0 ? "" : folder + ": " + std::strerror(errno);
}

std::string follow_links(const std::string& path) {
  constexpr int most = 40;  // as Linux does
  std::string at = path;
  for (int i = 0; i < most; ++i) {
    std::array<char, PATH_MAX> text;
    const ssize_t n = readlink(at.c_str(), text.data(), text.size());
    if (n <= 0) return at;
    const std::string target(text.data(), static_cast<std::size_t>(n));
    at = target[0] == '/' ? target : parent_of(at) + "/" + target;
  }
  return path;
}

bool same_file(const std::string& a, const std::string& b) {
  struct stat of_a {
  }, of_b{};
  const bool exists_a = stat(a.c_str(), &of_a) == 0, exists_b = stat(b.c_str(), &of_b) == 0;
  if (exists_a != exists_b) return false;
  const std::string end_a = follow_links(a), end_b = follow_links(b);
  if (!exists_a) {
    if (name_in_folder(end_a) != name_in_folder(end_b)) return false;
    if (stat(parent_of(end_a).c_str(), &of_a) != 0 || stat(parent_of(end_b).c_str(), &of_b) != 0) return end_a == end_b;
  }
  return of_a.st_dev == of_b.st_dev && of_a.st_ino == of_b.st_ino;
}

std::vector<std::string> names_in(const std::string& folder) {
  std::vector<std::string> names;
  std::error_code error;
  std::filesystem::directory_iterator at(folder, error);
  for (; !error && at != std::filesystem::directory_iterator(); at.increment(error))
    names.push_back(at->path().filename().string());
  return names;
}

std::string copy_file(const std::string& from, const std::string& to) {
  std::error_code error;
  return std::filesystem::copy_file(from, to, error) ? "" : error.message();
}

bool is_hdf5(const std::string& path) {
  constexpr std::string_view signature("\x89HDF\r\n\x1a\n", 8);
  std::ifstream file(path, std::ios::binary);
  for (std::streamoff at = 0; file; at = at == 0 ? 512 : 2 * at) {
    std::array<char, signature.size()> begin{};
    if (file.seekg(at).read(begin.data(), begin.size()) && std::string_view(begin.data(), begin.size()) == signature)
      return true;
  }
  return false;
}

void check_written_files(const std::vector<NamedFile>& files) {
  const auto refuse = [](const NamedFile& file, const std::string& why) {
    file_error("cannot write " + file.path, why, "choose another " + file.option);
  };
  for (const NamedFile& file : files) {
    if (file.path.empty() || file.use == NamedFile::read) continue;
    for (const NamedFile& other : files) {
      if (&other == &file) break;
      if (!other.path.empty() && same_file(file.path, other.path)) refuse(file, "it is " + other.name);
    }
    if (file.use != NamedFile::text) continue;
    if (const std::string why = why_not_written(file.path); !why.empty()) refuse(file, why);
  }
}

}  // namespace nsa
