// Memory, streams and events of the host. Streams run inline: what is queued is done.

#include <omp.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>

#include "kernels/diagnostics/error.hpp"
#include "kernels/diagnostics/fault_injection.hpp"
#include "kernels/diagnostics/out_of_memory.hpp"
#include "kernels/host/runtime/host.hpp"
#include "kernels/host/runtime/limits.hpp"
#include "kernels/host/runtime/x86_level.hpp"

namespace nsa {

namespace {

using host::free_memory;
using host::FreeMemory;
using host::meminfo;

using Stamp = std::chrono::steady_clock::time_point;  // an Event on the host

Stamp& stamp(Event* event) { return *reinterpret_cast<Stamp*>(event); }

constexpr std::size_t huge_page = std::size_t{1} << 21;

std::string cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  return "unknown CPU";
}

const char* simd_level() {
#if defined(__x86_64__) && defined(__GNUC__)
  const int level = x86_level();
  return level == 4 ? "x86-64-v4" : level == 3 ? "x86-64-v3" : "x86-64";
#elif defined(__aarch64__)
  return "aarch64";
#else
  return "generic";
#endif
}

/// Bytes that an allocation of this process could get at most.
std::int64_t bytes_free() {
  const FreeMemory free = free_memory();
  return free.process < 0 ? free.shared : std::min(free.process, free.shared);
}

void* allocate(std::size_t bytes) {
  // Linux overcommits and kills later: compare with the available memory first.
  const std::int64_t available = bytes >= (std::size_t{256} << 20) ? free_memory().shared : -1;
  void* data = nullptr;
  const bool fits = (available < 0 || bytes <= static_cast<std::size_t>(available)) &&
                    !fault::at("device.allocate").is(fault::Action::fail);
  if (!fits || posix_memalign(&data, bytes >= huge_page ? huge_page : 256, std::max<std::size_t>(bytes, 1)) != 0)
    throw UserError("out of host memory (" + std::to_string(bytes) + " bytes wanted, " + std::to_string(bytes_free()) +
                        " free); " + memory_advice(),
                    ExitCode::device);
  auto* begin = static_cast<char*>(data);
  if (bytes >= huge_page) madvise(data, bytes, MADV_HUGEPAGE);  // a hint: streaming reads touch many pages
#pragma omp parallel for if (bytes >= huge_page)                // first touch by the reading threads
  for (std::size_t i = 0; i < bytes; i += huge_page) std::memset(begin + i, 0xFF, std::min(huge_page, bytes - i));
  return data;
}

void copy(void* to, const void* from, std::size_t bytes, Stream*) {
  if (bytes > 0) std::memmove(to, from, bytes);
}

void fill(void* to, int byte, std::size_t bytes, Stream*) {
  if (bytes > 0) std::memset(to, byte, bytes);
}

void synchronize(Stream*) {
  if (fault::at("device.synchronize").is(fault::Action::fail))
    throw UserError("the host failed (by NSA_FAULT)", ExitCode::device);
}

double elapsed(Event* from, Event* to) { return std::chrono::duration<double>(stamp(to) - stamp(from)).count(); }

void stamp_clock(std::int64_t* ring, Stream*) {
  ring[1 + ring[0]++] = std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

DeviceInfo info() {
  DeviceInfo result;
  result.name = cpu_name();
  result.architecture = simd_level();
  result.units = std::min(omp_get_max_threads(), omp_get_thread_limit());
  if constexpr (fault::built) result.ecc_errors = fault::at("device.ecc").is(fault::Action::fail);
  result.memory_total = std::max<std::int64_t>(0, meminfo("MemTotal"));
  const FreeMemory free = free_memory();
  result.memory_free = std::max<std::int64_t>(0, free.shared);
  result.process_free = free.process;
#ifdef _SC_LEVEL3_CACHE_SIZE
  result.cache_bytes = std::max(0L, std::max(sysconf(_SC_LEVEL2_CACHE_SIZE), sysconf(_SC_LEVEL3_CACHE_SIZE)));
#endif
  return result;
}

}  // namespace

const DeviceOps& host_device() {
  static const DeviceOps ops = {
      .allocate = allocate,
      .release = [](void* data) noexcept { std::free(data); },
      .create_stream = []() -> Stream* { return nullptr; },
      .destroy_stream = [](Stream*) noexcept {},
      .synchronize = synchronize,
      .copy = copy,
      .fill = fill,
      .create_event = [] { return reinterpret_cast<Event*>(new Stamp); },
      .destroy_event = [](Event* event) noexcept { delete reinterpret_cast<Stamp*>(event); },
      .record = [](Event* event, Stream*) { stamp(event) = std::chrono::steady_clock::now(); },
      .wait = [](Stream*, Event*) {},
      .elapsed = elapsed,
      .capture = nullptr,
      .launch = nullptr,
      .destroy_graph = nullptr,
      .info = info,
      .stamp = stamp_clock,
      .read_clock = nullptr,
  };
  return ops;
}

void set_host_threads(int threads) { omp_set_num_threads(std::clamp(threads, 1, omp_get_thread_limit())); }

}  // namespace nsa
