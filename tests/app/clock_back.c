/* Preloaded (LD_PRELOAD): the clock of the day goes back by an hour, 0.3 s after the process has started. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <sys/time.h>
#include <time.h>

static struct timespec started;

static int next_clock(clockid_t clock, struct timespec* to) {
  static int (*next)(clockid_t, struct timespec*);
  if (!next) next = (__typeof__(next))dlsym(RTLD_NEXT, "clock_gettime");
  return next(clock, to);
}

__attribute__((constructor)) static void start(void) { next_clock(CLOCK_MONOTONIC, &started); }

int clock_gettime(clockid_t clock, struct timespec* to) {
  const int result = next_clock(clock, to);
  if (result != 0 || (clock != CLOCK_REALTIME && clock != CLOCK_REALTIME_COARSE)) return result;
  struct timespec now;
  next_clock(CLOCK_MONOTONIC, &now);
  if ((double)(now.tv_sec - started.tv_sec) + 1e-9 * (double)(now.tv_nsec - started.tv_nsec) > 0.3) to->tv_sec -= 3600;
  return result;
}

time_t time(time_t* to) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (to) *to = now.tv_sec;
  return now.tv_sec;
}

int gettimeofday(struct timeval* to, void* zone) {
  struct timespec now;
  (void)zone;
  clock_gettime(CLOCK_REALTIME, &now);
  *to = (struct timeval){now.tv_sec, now.tv_nsec / 1000};
  return 0;
}
