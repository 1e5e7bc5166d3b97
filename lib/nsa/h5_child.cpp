// A damaged file may crash HDF5 itself, or keep it in a loop: what reads a file we have not written tries it in a
// child.

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <string>

#include "nsa/h5.hpp"

namespace nsa::h5 {
namespace {

[[noreturn]] void run_child(const std::function<void()>& read, rlim_t cpu_seconds) {
  for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGABRT, SIGXCPU}) std::signal(signal, SIG_DFL);
  const rlimit limit{cpu_seconds, cpu_seconds + 1}, none{0, 0};
  setrlimit(RLIMIT_CPU, &limit);
  setrlimit(RLIMIT_CORE, &none);
  const int nowhere = open("/dev/null", O_WRONLY);  // the parent says what is to be said
  dup2(nowhere, STDOUT_FILENO);
  dup2(nowhere, STDERR_FILENO);
  try {
    read();
  } catch (...) {  // an error is an answer, and the parent meets it again
  }
  _exit(0);
}

}  // namespace

void try_in_child(const std::function<void()>& read, int cpu_seconds) {
  const pid_t child = fork();
  if (child == 0) run_child(read, static_cast<rlim_t>(cpu_seconds));
  int status = 0;
  pid_t ended = -1;
  while (child > 0 && (ended = waitpid(child, &status, 0)) < 0 && errno == EINTR) {
  }
  if (ended != child || status == 0) return;  // without a child to ask we go on as if it had read the file
  throw Error("damaged: the HDF5 library " +
              (WIFSIGNALED(status) && WTERMSIG(status) == SIGXCPU ? "does not come to an end"
               : WIFSIGNALED(status) ? "crashes, signal " + std::to_string(WTERMSIG(status)) + ","
                                     : std::string("crashes")) +
              " on it");
}

}  // namespace nsa::h5
