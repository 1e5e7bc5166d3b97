// What reads a file that we have not written lets a child talk to HDF5.

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <string>
#include <string_view>

#include "nsa/results/hdf5/h5.hpp"

namespace nsa::h5 {
namespace {

constexpr char answered = 'a', refused = 'r';  ///< the first byte of what a child says

bool write_all(int pipe, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(pipe, bytes.data(), bytes.size());
    if (n < 0 && errno != EINTR) return false;
    if (n > 0) bytes.remove_prefix(static_cast<std::size_t>(n));
  }
  return true;
}

std::string read_all(int pipe) {
  std::string bytes;
  char buffer[65536];
  for (;;) {
    const ssize_t n = ::read(pipe, buffer, sizeof buffer);
    if (n == 0 || (n < 0 && errno != EINTR)) return bytes;
    if (n > 0) bytes.append(buffer, static_cast<std::size_t>(n));
  }
}

[[noreturn]] void run_child(const std::function<std::string()>& answer, rlim_t cpu_seconds, int pipe) {
  for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGABRT, SIGXCPU, SIGPIPE}) std::signal(signal, SIG_DFL);
  const rlimit limit{cpu_seconds, cpu_seconds + 1}, none{0, 0};
  setrlimit(RLIMIT_CPU, &limit);
  setrlimit(RLIMIT_CORE, &none);
  const int nowhere = open("/dev/null", O_WRONLY);  // the parent says what is to be said
  dup2(nowhere, STDOUT_FILENO);
  dup2(nowhere, STDERR_FILENO);
  std::string said;
  try {
    said = answered + answer();
  } catch (const std::exception& error) {
    said = std::string(1, refused) + error.what();
  }
  _exit(write_all(pipe, said) ? 0 : 1);
}

}  // namespace

std::string ask_child(const std::function<std::string()>& answer, int cpu_seconds) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return answer();  // without a child to ask we read it ourselves
  const pid_t child = fork();
  if (child == 0) run_child(answer, static_cast<rlim_t>(cpu_seconds), ends[1]);
  close(ends[1]);
  std::string said = child > 0 ? read_all(ends[0]) : "";
  close(ends[0]);
  if (child < 0) return answer();
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  if (status == 0 && !said.empty()) {
    const bool good = said[0] == answered;
    said.erase(0, 1);
    if (good) return said;
    throw Error(said);
  }
  throw Error("damaged: the HDF5 library " +
              (WIFSIGNALED(status) && WTERMSIG(status) == SIGXCPU ? "does not come to an end"
               : WIFSIGNALED(status) ? "crashes, signal " + std::to_string(WTERMSIG(status)) + ","
                                     : std::string("crashes")) +
              " on it");
}

}  // namespace nsa::h5
