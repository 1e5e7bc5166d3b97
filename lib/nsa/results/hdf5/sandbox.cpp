// Reads of files from elsewhere run HDF5 in a child process.

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

constexpr char succeeded = 'a', failed = 'r';  ///< the first byte of the child's reply

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

[[noreturn]] void run_child(const std::function<std::string()>& action, rlim_t cpu_seconds, int pipe) {
  for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGABRT, SIGXCPU, SIGPIPE}) std::signal(signal, SIG_DFL);
  const rlimit limit{cpu_seconds, cpu_seconds + 1}, none{0, 0};
  setrlimit(RLIMIT_CPU, &limit);
  setrlimit(RLIMIT_CORE, &none);
  const int null_device = open("/dev/null", O_WRONLY);  // the parent prints all messages
  dup2(null_device, STDOUT_FILENO);
  dup2(null_device, STDERR_FILENO);
  std::string reply;
  try {
    reply = succeeded + action();
  } catch (const std::exception& error) {
    reply = std::string(1, failed) + error.what();
  }
  _exit(write_all(pipe, reply) ? 0 : 1);
}

}  // namespace

std::string run_sandboxed(const std::function<std::string()>& action, int cpu_seconds) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return action();  // without a child this process reads the file
  const pid_t child = fork();
  if (child == 0) run_child(action, static_cast<rlim_t>(cpu_seconds), ends[1]);
  close(ends[1]);
  std::string reply = child > 0 ? read_all(ends[0]) : "";
  close(ends[0]);
  if (child < 0) return action();
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  if (status == 0 && !reply.empty()) {
    const bool success = reply[0] == succeeded;
    reply.erase(0, 1);
    if (success) return reply;
    throw Error(reply);
  }
  throw Error("damaged: the HDF5 library " +
              (WIFSIGNALED(status) && WTERMSIG(status) == SIGXCPU ? "does not come to an end"
               : WIFSIGNALED(status) ? "crashes, signal " + std::to_string(WTERMSIG(status)) + ","
                                     : std::string("crashes")) +
              " on it");
}

}  // namespace nsa::h5
