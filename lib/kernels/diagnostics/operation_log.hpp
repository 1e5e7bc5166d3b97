#pragma once
// The operation log, a flight recorder: the last 64 operations of a rank that may wait for another rank or for its
// device. Another thread, the watchdog (comm/watchdog/watchdog.hpp), may read it at any time. The begin and the end of
// an operation cost a coarse clock reading and a few stores each, no lock and no allocation.
//
// One thread of a process, the one that calls MPI and the device, begins and ends operations, one at a time.

#include <cstddef>
#include <cstdint>
#include <vector>

namespace nsa {

enum class OperationKind : std::int32_t {
  wait,     ///< local: waits for the device or in a library
  control,  ///< collective that exchanges the ranks' status
  exchange  ///< collective of the algorithm: same name, stage and bytes on every rank of its group
};

/// A logged operation: trivially copyable, so that processes of one program can send it as bytes.
struct OperationRecord {
  std::uint64_t index = 0;   ///< among all operations of this rank, from 1
  std::uint64_t number = 0;  ///< collectives begun so far, this one included: equal on all ranks
  std::uint64_t bytes = 0;
  std::uint64_t group = 0;          ///< equal on the participating ranks; 0: a local operation
  std::int64_t begin = 0, end = 0;  ///< ns on this rank's clock; end 0: in progress
  OperationKind kind = OperationKind::wait;
  char name[20] = {}, phase[20] = {}, stage[20] = {};  ///< "all_gather", "decode", "lse"
};

constexpr std::size_t operation_log_capacity = 64;

/// ns of a monotonic, coarse clock (a few ms), cheap to read.
std::int64_t coarse_now() noexcept;

/// Logs an operation from construction to destruction. Names must be literals: the log stores the pointers. Default
/// stage: the current one.
class Operation {
 public:
  explicit Operation(OperationKind kind, const char* name, std::uint64_t bytes = 0, std::uint64_t group = 0,
                     const char* stage = nullptr) noexcept;
  ~Operation();
  Operation(const Operation&) = delete;
  Operation& operator=(const Operation&) = delete;
};

/// Sets the rank's phase ("prefill", "decode", ...) during its lifetime.
class PhaseScope {
 public:
  explicit PhaseScope(const char* name) noexcept;
  ~PhaseScope();
  PhaseScope(const PhaseScope&) = delete;
  PhaseScope& operator=(const PhaseScope&) = delete;

 private:
  const char* outer_;
};

/// During its lifetime collectives are logged as waits and not counted: they are only being captured into a graph, and
/// captured again after a failed capture.
class CaptureScope {
 public:
  CaptureScope() noexcept;
  ~CaptureScope();
  CaptureScope(const CaptureScope&) = delete;
  CaptureScope& operator=(const CaptureScope&) = delete;
};

/// Sets the rank's stage; a literal.
void set_stage(const char* name) noexcept;

/// What the rank is doing.
struct Activity {
  char phase[20] = {}, stage[20] = {};
};
/// Any thread.
Activity current_activity();

/// The logged operations with an index above `after`, by rising index. Any thread.
std::vector<OperationRecord> recent_operations(std::uint64_t after = 0);

}  // namespace nsa
