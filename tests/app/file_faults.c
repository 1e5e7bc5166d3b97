/* Real faults of files, for the tests: preloaded (LD_PRELOAD), it makes the n-th call of one system function on a
 * ".tmp" file, or on a folder, fail with an errno, kill the process before or after the call, or wait.
 *   FILE_FAULT=function:n:ACTION   an errno as a number, kill, killed-after, wait (until the log's name + ".go" exists)
 *   FILE_FAULT_LOG=path            gets a line for each call
 * Functions: open pwrite fsync fsync_folder rename link flock copy. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int is_temporary(const char* path) {
  const size_t length = path ? strlen(path) : 0;
  return length > 4 && strcmp(path + length - 4, ".tmp") == 0;
}

static int fd_is_temporary(int fd) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return is_temporary(path);
}

static int fd_is_folder(int fd) {
  struct stat found;
  return fstat(fd, &found) == 0 && S_ISDIR(found.st_mode);
}

static int kill_after;

/* Whether this call is to fail; errno is set then. */
static int faulty(const char* function) {
  static struct {
    char name[32];
    int calls;
  } seen[16];
  int i = 0;
  while (seen[i].name[0] && strcmp(seen[i].name, function) != 0) ++i;
  strcpy(seen[i].name, function);
  const int call = ++seen[i].calls;
  kill_after = 0;
  const char* log = getenv("FILE_FAULT_LOG");
  if (log) {
    const int fd = NEXT(open)(log, O_WRONLY | O_CREAT | O_APPEND, 0666);
    dprintf(fd, "%s %d\n", function, call);
    close(fd);
  }
  const char* fault = getenv("FILE_FAULT");
  char name[32], action[32];
  int at = 0;
  if (!fault || sscanf(fault, "%31[^:]:%d:%31s", name, &at, action) != 3) return 0;
  if (strcmp(name, function) != 0 || at != call) return 0;
  if (strcmp(action, "kill") == 0) raise(SIGKILL);
  if (strcmp(action, "wait") == 0) {
    char go[4096];
    snprintf(go, sizeof go, "%s.go", log ? log : "");
    for (int i = 0; i < 12000 && access(go, F_OK) != 0; ++i) usleep(10000);
    return 0;
  }
  if (strcmp(action, "killed-after") == 0) return kill_after = 1, 0;
  errno = atoi(action);
  return 1;
}

#define GUARD(condition, function, call) \
  if (!(condition)) return call;         \
  if (faulty(function)) return -1;       \
  const __typeof__(call) result = call;  \
  if (kill_after) raise(SIGKILL);        \
  return result

int open(const char* path, int flags, ...) {
  va_list list;
  va_start(list, flags);
  const int mode = (flags & O_CREAT) ? va_arg(list, int) : 0;
  va_end(list);
  GUARD(is_temporary(path) && (flags & O_CREAT), "open", NEXT(open)(path, flags, mode));
}
int open64(const char* path, int flags, ...) {
  va_list list;
  va_start(list, flags);
  const int mode = (flags & O_CREAT) ? va_arg(list, int) : 0;
  va_end(list);
  GUARD(is_temporary(path) && (flags & O_CREAT), "open", NEXT(open64)(path, flags, mode));
}
ssize_t pwrite(int fd, const void* data, size_t size, off_t at) {
  GUARD(fd_is_temporary(fd), "pwrite", NEXT(pwrite)(fd, data, size, at));
}
ssize_t pwrite64(int fd, const void* data, size_t size, off64_t at) {
  GUARD(fd_is_temporary(fd), "pwrite", NEXT(pwrite64)(fd, data, size, at));
}
int fsync(int fd) {
  if (fd_is_folder(fd)) {
    GUARD(1, "fsync_folder", NEXT(fsync)(fd));
  }
  GUARD(fd_is_temporary(fd), "fsync", NEXT(fsync)(fd));
}
int rename(const char* from, const char* to) { GUARD(is_temporary(from), "rename", NEXT(rename)(from, to)); }
int link(const char* from, const char* to) { GUARD(is_temporary(from), "link", NEXT(link)(from, to)); }
int flock(int fd, int operation) { GUARD(fd_is_temporary(fd), "flock", NEXT(flock)(fd, operation)); }
ssize_t sendfile(int out, int in, off_t* at, size_t size) {
  GUARD(fd_is_temporary(out), "copy", NEXT(sendfile)(out, in, at, size));
}
ssize_t sendfile64(int out, int in, off64_t* at, size_t size) {
  GUARD(fd_is_temporary(out), "copy", NEXT(sendfile64)(out, in, at, size));
}
ssize_t copy_file_range(int in, off64_t* from, int out, off64_t* to, size_t size, unsigned flags) {
  GUARD(fd_is_temporary(out), "copy", NEXT(copy_file_range)(in, from, out, to, size, flags));
}
