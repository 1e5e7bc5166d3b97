#pragma once
// What a rank does that may wait for another rank or for its device: the last 64 operations, kept where another
// thread can read them at any moment. The watchdog (comm/watchdog/watchdog.hpp) is that thread. Beginning and ending an
// operation costs a coarse clock reading and a few stores each, no lock and no memory.
//
// One thread of a process, the one that calls MPI and the device, begins and ends operations, one at a time.

#include <cstddef>
#include <cstdint>
#include <vector>

namespace nsa {

enum class OperationKind : std::int32_t {
  wait,     ///< of this rank alone: for its device, or in a library
  control,  ///< collective, ranks telling each other how they fare
  exchange  ///< collective, of the algorithm: the same name, stage and bytes on every rank of its group
};

/// An operation as others see it: plain bytes, so that processes of one program can send it as it is.
struct OperationRecord {
  std::uint64_t index = 0;   ///< of all operations of this rank, from 1
  std::uint64_t number = 0;  ///< collectives this rank has begun, this one among them: alike on all ranks
  std::uint64_t bytes = 0;
  std::uint64_t group = 0;          ///< equal on the ranks that take part; 0: alone
  std::int64_t begin = 0, end = 0;  ///< ns on this rank's clock; end 0: not over
  OperationKind kind = OperationKind::wait;
  char name[20] = {}, phase[20] = {}, stage[20] = {};  ///< "all_gather", "decode", "lse"
};

constexpr std::size_t operation_log_capacity = 64;

/// ns of a clock that never jumps; coarse (a few ms), and cheap to read.
std::int64_t coarse_now() noexcept;

/// In an operation while it lives. Names are literals: the pointers are kept. Without a stage: the current one.
class Operation {
 public:
  explicit Operation(OperationKind kind, const char* name, std::uint64_t bytes = 0, std::uint64_t group = 0,
                     const char* stage = nullptr) noexcept;
  ~Operation();
  Operation(const Operation&) = delete;
  Operation& operator=(const Operation&) = delete;
};

/// What the rank works on while it lives: "prefill", "decode", ...
class PhaseScope {
 public:
  explicit PhaseScope(const char* name) noexcept;
  ~PhaseScope();
  PhaseScope(const PhaseScope&) = delete;
  PhaseScope& operator=(const PhaseScope&) = delete;

 private:
  const char* outer_;
};

/// While it lives collectives are logged as waits and not counted: they are only being captured, and where a capture
/// fails again.
class CaptureScope {
 public:
  CaptureScope() noexcept;
  ~CaptureScope();
  CaptureScope(const CaptureScope&) = delete;
  CaptureScope& operator=(const CaptureScope&) = delete;
};

void set_stage(const char* name) noexcept;

struct Activity {
  char phase[20] = {}, stage[20] = {};
};
Activity current_activity();  ///< any thread

/// Those kept, with an index above `after`, by rising index. Any thread.
std::vector<OperationRecord> recent_operations(std::uint64_t after = 0);

}  // namespace nsa
