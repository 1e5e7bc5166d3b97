#pragma once
// Fault injection for tests of error handling. Only a build with NSA_FAULTS=ON (preset host-faults) has it; in every
// other build these functions are empty and the program does not contain the sites' names.
//
// A site queries its fault by name. The environment sets the site, rank and call of each fault:
//   NSA_FAULT="site[:rank=R][:at=N]:ACTION[;...]"
//   rank=R   only this world rank; default: every rank
//   at=N     the N-th call of the site on that rank, from 1; at=every: all calls; default: the first
//   ACTION   kill (SIGKILL to itself), stop (SIGSTOP to itself), hang (sleeps without end), delay=SECONDS: performed
//            by the hook;
//            fail[=N], skip[=N], shorten[=N], flip[=BIT]: performed by the site, which defines what it means
// Site names contain a dot: "comm.all_gather", "device.allocate", "result.rename".

#include <cstddef>
#include <cstdint>

#include "kernels/interface/backend.hpp"

namespace nsa::fault {

enum class Action { none, fail, skip, shorten, flip };

/// The fault of a site. `value`: the number after the action's '=', else 0: a count, a bit, an errno.
struct Fault {
  Action action = Action::none;
  std::int64_t value = 0;
  constexpr bool is(Action which) const { return action == which; }
};

#if NSA_FAULTS

constexpr bool built = true;
/// The rank that `rank=` is compared with; 0 until it is set.
void set_rank(int rank);
/// Counts the call. Performs kill, stop, hang and delay; returns any other action. Throws UserError when NSA_FAULT is
/// malformed. Any thread.
Fault at(const char* site);
/// A site that can flip: inverts bit `value` (modulo the size) of backend memory. Waits for the stream before and
/// after.
void flip(const char* site, const DeviceOps& device, void* data, std::size_t bytes, Stream* stream);
/// A site that launches: on `fail`, queues a launch that the device refuses (where it has launches) and throws
/// LaunchError.
void refuse_launch(const char* site, const DeviceOps& device, Stream* stream);

#else

constexpr bool built = false;
constexpr void set_rank(int) {}
constexpr Fault at(const char*) { return {}; }
constexpr void flip(const char*, const DeviceOps&, void*, std::size_t, Stream*) {}
constexpr void refuse_launch(const char*, const DeviceOps&, Stream*) {}

#endif

}  // namespace nsa::fault
