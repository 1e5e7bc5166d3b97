#pragma once
// From what the ranks tell of their operations to who is at fault: pure, no clock, no sockets.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels/diagnostics/operation_log.hpp"

namespace nsa {

/// What is known of one rank.
struct RankView {
  enum class State { running, left, lost };  ///< left: said so; lost: its connection ended without a word
  State state = State::running;
  int rank = 0;
  std::string host, device;                 ///< device: "GPU 1", or empty
  std::vector<OperationRecord> operations;  ///< at most the last 64, by rising index
  Activity place;
  std::string failure;       ///< what its library said; empty: nothing
  std::int64_t told = 0;     ///< its clock when it last spoke
  std::int64_t heard = 0;    ///< our clock then; 0: never
  std::int64_t changed = 0;  ///< our clock when it was lost or told its failure
  /// Adds news: those known already are replaced, since they may have ended.
  void take(const std::vector<OperationRecord>& news);
};

/// ns.
struct WatchTimes {
  std::int64_t deadline = 0;  ///< of an operation; 0: none
  std::int64_t patience = 0;  ///< beyond the deadline: somebody else may judge first
  std::int64_t silence = 0;   ///< a rank that has said nothing for so long does not answer
  std::int64_t grace = 0;     ///< between a failure or a loss and the verdict: the others catch up
};

struct Verdict {
  std::vector<int> silent;  ///< ranks that do not answer
  std::string message;      ///< "<what> (<why>); <what to do>"
};

/// Whether the job has to end, and why: a rank was lost; ranks did different things in one place; a library
/// failed; or an operation is older than the deadline, and then who is behind. Ranks that left count no more.
/// `compared`: the last collective found to be the same on all ranks, 0 at first; carried from call to call.
std::optional<Verdict> judge(const std::vector<RankView>& ranks, std::int64_t now, const WatchTimes& times,
                             std::uint64_t& compared);

/// "all_gather #217 [decode, lse]"; a wait: "device wait after #217 [decode, attend_sel]".
std::string describe(const OperationRecord& operation);

}  // namespace nsa
