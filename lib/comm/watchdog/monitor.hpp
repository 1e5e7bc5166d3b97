#pragma once
// The monitor collects the heartbeats of all ranks. The first and the last rank of a job run one each, so that one may
// fail.
//
// The port of a monitor is open from the start of the job until all ranks have connected, on the loopback device alone
// if all ranks share a machine. The monitor closes a connection whose first message does not hold the token that the
// ranks share over MPI. It limits the size of that message and the number and lifetime of such connections.

#include <cstdint>
#include <string>
#include <vector>

#include "comm/process_id.hpp"
#include "comm/watchdog/connection.hpp"
#include "comm/watchdog/diagnosis.hpp"
#include "comm/watchdog/protocol.hpp"

namespace nsa {

class Monitor {
 public:
  /// `rank`: the rank that runs the monitor. `hosts`: host names of all ranks.
  Monitor(FileDescriptor listener, std::string token, int rank, const std::vector<std::string>& hosts);

  /// Accepts connections and handles the messages that have arrived. Never blocks. `now`: ns.
  void progress(std::int64_t now);
  /// Closes the port: all ranks have connected.
  void stop_accepting() { listener_.reset(); }
  void send_to_all(const std::string& message);
  bool has_running_ranks() const;  ///< a rank is connected that has not sent goodbye

  std::vector<RankStatus>& ranks() { return ranks_; }  ///< by rank; one that never connected is `finished`
  RankStatus& own_status() { return ranks_[static_cast<std::size_t>(rank_)]; }
  void append_poll_entries(std::vector<pollfd>& entries) const;

 private:
  struct Client {
    Connection connection;
    std::int64_t accepted_at = 0;
    int rank = -1;  ///< -1 until authenticated
  };
  void accept_connections(std::int64_t now);
  void drop_unauthenticated(std::int64_t now);
  bool handle_message(Client& client, const std::string& message, std::int64_t now);
  bool handle_handshake(Client& client, const std::string& message, std::int64_t now);

  FileDescriptor listener_;
  std::string token_;
  int rank_;
  std::vector<RankStatus> ranks_;
  std::vector<Client> clients_;
};

/// Opens a port that all these processes can reach. Returns "PORT ADDRESS ADDRESS ..." for connect_to_monitor; "", with
/// `listener` closed, on failure.
std::string open_monitor_port(const std::vector<ProcessId>& processes, FileDescriptor& listener);

/// Connects rank `rank` to the monitor at `endpoint`: over the loopback device, which firewalls let through, on the
/// same machine. Closed if none of the addresses answers within 12 s.
Connection connect_to_monitor(const std::string& endpoint, bool same_machine, const std::string& token, int rank);

}  // namespace nsa
