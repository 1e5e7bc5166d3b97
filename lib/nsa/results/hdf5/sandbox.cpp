// Reads of files from elsewhere run HDF5 in a child process.

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <new>
#include <string>
#include <string_view>
#include <utility>

#include "nsa/results/hdf5/h5.hpp"

namespace nsa::h5 {
namespace {

constexpr char succeeded = 'a', no_memory = 'm',
               failed = '0';  ///< first byte of the child's reply; failed + kind of Error

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

/// Ends this process with SIGXCPU after that much more processor time, or a second later: limits are whole seconds. A
/// stricter limit of the user stays.
void limit_processor_time(rlim_t seconds) {
  rusage used{};
  rlimit limit{};
  getrusage(RUSAGE_SELF, &used);
  getrlimit(RLIMIT_CPU, &limit);
  const auto microseconds = used.ru_utime.tv_usec + used.ru_stime.tv_usec;  // the sum of both may reach another second
  const auto so_far = used.ru_utime.tv_sec + used.ru_stime.tv_sec + microseconds / 1'000'000;
  limit.rlim_cur = std::min(limit.rlim_max, static_cast<rlim_t>(so_far + 1) + seconds);
  setrlimit(RLIMIT_CPU, &limit);
}

[[noreturn]] void run_child(const SandboxedAction& action, rlim_t cpu_seconds, int pipe) {
  for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGABRT, SIGXCPU, SIGPIPE}) std::signal(signal, SIG_DFL);
  limit_processor_time(cpu_seconds);
  const rlimit none{0, 0};
  setrlimit(RLIMIT_CORE, &none);
  const int null_device = open("/dev/null", O_WRONLY);  // the parent prints all messages
  dup2(null_device, STDOUT_FILENO);
  dup2(null_device, STDERR_FILENO);
  std::string reply;
  try {
    reply = succeeded + action([&] { limit_processor_time(cpu_seconds); });
  } catch (const std::bad_alloc&) {
    reply = no_memory;
  } catch (const Error& error) {
    reply = std::string(1, static_cast<char>(failed + error.kind())) + error.what();
  } catch (const std::exception& error) {
    reply = std::string(1, failed) + error.what();
  }
  limit_processor_time(cpu_seconds);
  _exit(write_all(pipe, reply) ? 0 : 1);
}

/// How a child ended that sent no reply.
std::string end_of(int status, int cpu_seconds) {
  if (!WIFSIGNALED(status)) return "damaged: the HDF5 library crashes on it";
  const int signal = WTERMSIG(status);
  if (signal == SIGXCPU)
    return "reading it got no further in " + std::to_string(cpu_seconds) + " s of processor time: it may be damaged";
  if (signal == SIGKILL) return "the system killed the process that read it: too little memory, or a limit of time";
  return "damaged: the HDF5 library crashes, signal " + std::to_string(signal) + ", on it";
}

/// Waits for the process to end. Returns its status.
int wait_for(pid_t child) {
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  return status;
}

}  // namespace

Sandbox::Sandbox(SandboxedAction action, int cpu_seconds) : action_(std::move(action)), cpu_seconds_(cpu_seconds) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return;
  child_ = fork();
  if (child_ == 0) run_child(action_, static_cast<rlim_t>(cpu_seconds), ends[1]);
  close(ends[1]);
  reply_ = ends[0];
}

Sandbox::~Sandbox() {
  if (child_ > 0) {
    kill(child_, SIGKILL);
    wait_for(child_);
  }
  if (reply_ >= 0) close(reply_);
}

std::string Sandbox::result() {
  if (child_ < 0) return action_([] {});
  std::string reply = read_all(reply_);
  const int status = wait_for(std::exchange(child_, -1));
  if (status != 0 || reply.empty()) throw Error(end_of(status, cpu_seconds_));
  const char kind = reply[0];
  reply.erase(0, 1);
  if (kind == no_memory) throw std::bad_alloc();
  if (kind != succeeded) throw Error(reply, static_cast<Error::Kind>(kind - failed));
  return reply;
}

}  // namespace nsa::h5
