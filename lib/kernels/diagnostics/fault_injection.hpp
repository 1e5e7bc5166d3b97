#pragma once
// Faults on request, for tests of what happens then. Only a build with NSA_FAULTS=ON (preset host-faults) holds
// them; in every other build these functions are empty and the sites' names are gone from the program.
//
// A site asks by name what is to go wrong there; the environment says which site, on which rank, at which call:
//   NSA_FAULT="site[:rank=R][:at=N]:ACTION[;...]"
//   rank=R   this world rank only; without it every rank
//   at=N     the N-th call of the site on that rank, from 1; at=every: all calls; without it the first
//   ACTION   kill (SIGKILL to itself), stop (SIGSTOP to itself), hang (sleeps for ever), delay=SECONDS: done by
//            the hook;
//            fail[=N], skip[=N], shorten[=N], flip[=BIT]: done by the site, which knows what that means there
// Names of sites have a dot: "comm.all_gather", "device.allocate", "result.rename".

#include <cstddef>
#include <cstdint>

#include "kernels/interface/backend.hpp"

namespace nsa::fault {

enum class Action { none, fail, skip, shorten, flip };

/// What is to go wrong at a site. `value` is what stands behind the action's '=', 0 without: a count, a bit, an errno.
struct Fault {
  Action action = Action::none;
  std::int64_t value = 0;
  constexpr bool is(Action which) const { return action == which; }
};

#if NSA_FAULTS

constexpr bool built = true;
/// The rank that `rank=` is compared with; 0 until it is set.
void set_rank(int rank);
/// Counts the call; kills, stops, hangs or delays here, and returns the rest. Throws UserError when NSA_FAULT has
/// an error. Any thread.
Fault at(const char* site);
/// A site that can flip: turns bit `value` (modulo the size) of backend memory; waits for the stream before and after.
void flip(const char* site, const DeviceOps& device, void* data, std::size_t bytes, Stream* stream);
/// A site that launches: where it is to fail, throws LaunchError after a launch that the device really refused, on a
/// device that has launches.
void refuse_launch(const char* site, const DeviceOps& device, Stream* stream);

#else

constexpr bool built = false;
constexpr void set_rank(int) {}
constexpr Fault at(const char*) { return {}; }
constexpr void flip(const char*, const DeviceOps&, void*, std::size_t, Stream*) {}
constexpr void refuse_launch(const char*, const DeviceOps&, Stream*) {}

#endif

}  // namespace nsa::fault
