#include "app/threads.hpp"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#include "kernels/host/host.hpp"

namespace nsa {

int fair_threads(const Control& world) {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  if (sched_getaffinity(0, sizeof cores, &cores) != 0) return 1;
  std::string place(256, '\0');
  gethostname(place.data(), place.size() - 1);
  for (int core = 0; core < CPU_SETSIZE; ++core) place += CPU_ISSET(core, &cores) ? '1' : '0';
  std::string all;
  for (const std::string& other : world.gather(place)) all += other;
  all = world.broadcast(all);
  int sharers = 0;
  for (std::size_t at = 0; at < all.size(); at += place.size()) sharers += all.compare(at, place.size(), place) == 0;
  return std::max(1, CPU_COUNT(&cores) / std::max(1, sharers));
}

void choose_host_threads(const Control& world) {
  const int threads = fair_threads(world);
  if (std::getenv("OMP_NUM_THREADS") == nullptr) set_host_threads(threads);
}

}  // namespace nsa
