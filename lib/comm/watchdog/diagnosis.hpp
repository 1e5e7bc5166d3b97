#pragma once
// Diagnoses a hang from the operations that the ranks reported. A pure function of its arguments: no clock, no sockets.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels/diagnostics/operation_log.hpp"

namespace nsa {

/// What a watchdog knows of one rank. Times in ns.
struct RankStatus {
  /// finished: the rank sent goodbye or never connected. lost: its connection closed without a goodbye.
  enum class State { running, finished, lost };
  State state = State::running;
  int rank = 0;
  std::string host, device;                 ///< device: "GPU 1", or empty
  std::vector<OperationRecord> operations;  ///< the last 64 at most, by rising index
  Activity location;                        ///< current phase and stage
  std::string failure;                      ///< error message of a library on that rank; empty: none
  std::int64_t sent_at = 0;                 ///< clock of the rank when it sent its last heartbeat
  std::int64_t received_at = 0;             ///< own clock when that heartbeat arrived; 0: never
  std::int64_t failed_at = 0;               ///< own clock when the rank was lost or reported its failure
  /// Adds reported operations. They replace the known ones from the first reported index on, which may have ended.
  void merge_operations(const std::vector<OperationRecord>& reported);
};

/// In ns.
struct Timeouts {
  std::int64_t deadline = 0;           ///< of one operation; 0: none
  std::int64_t deadline_margin = 0;    ///< beyond the deadline: another watchdog may diagnose first
  std::int64_t heartbeat_timeout = 0;  ///< a rank without a heartbeat for longer is silent
  std::int64_t grace_period = 0;       ///< between a failure or loss and its diagnosis: the other ranks catch up
  bool starting = false;               ///< not all ranks have connected; the deadline is that of the start
};

struct HangDiagnosis {
  std::vector<int> silent_ranks;  ///< ranks that send no heartbeats
  std::string message;            ///< "<what> (<why>); <what to do>"
};

/// Decides whether the job has to end, and why. The reasons, in this order: the ranks' collectives do not match; a
/// library failed; a rank was lost; an operation is older than the deadline, and then the ranks that are late are
/// named. Ranks that finished are ignored for the last reason. `last_compared`: number of the last collective found
/// equal on all ranks, 0 at first; in and out.
std::optional<HangDiagnosis> diagnose(const std::vector<RankStatus>& ranks, std::int64_t now, const Timeouts& timeouts,
                                      std::uint64_t& last_compared);

/// "all_gather #217 [decode, lse]"; for a wait "device wait after #217 [decode, attend_sel]".
std::string describe(const OperationRecord& operation);

}  // namespace nsa
