#pragma once
// Where the watchdogs of all ranks report: the first and the last rank of a job are hubs, so that one may be lost.
//
// A hub's port is open to whoever reaches it, from the start of the job until all ranks have joined: on the loopback
// device alone where all ranks share a machine. Whoever does not begin with the token that the ranks share over MPI is
// shut out; until then little is read, and there are not many such connections, nor for long.

#include <cstdint>
#include <string>
#include <vector>

#include "comm/process_id.hpp"
#include "comm/watchdog/connection.hpp"
#include "comm/watchdog/diagnosis.hpp"
#include "comm/watchdog/protocol.hpp"

namespace nsa {

class Hub {
 public:
  /// Of rank `rank`; `hosts`: of all ranks.
  Hub(Descriptor listener, std::string token, int rank, const std::vector<std::string>& hosts);

  /// Takes connections and hears what has come; never waits. `now`: ns.
  void listen(std::int64_t now);
  /// All who will join have.
  void stop_accepting() { listener_.reset(); }
  void tell_all(const std::string& message);
  bool hears_anyone() const;  ///< a rank is connected that has not left

  std::vector<RankView>& views() { return views_; }  ///< by rank; those that never joined count as left
  RankView& own_view() { return views_[static_cast<std::size_t>(rank_)]; }
  void add_waiting(std::vector<pollfd>& list) const;

 private:
  struct Peer {
    Link link;
    std::int64_t since = 0;
    int rank = -1;  ///< until it has said so
  };
  void accept_all(std::int64_t now);
  void drop_silent_strangers(std::int64_t now);
  bool hear(Peer& peer, const std::string& message, std::int64_t now);
  bool welcome(Peer& peer, const std::string& message, std::int64_t now);

  Descriptor listener_;
  std::string token_;
  int rank_;
  std::vector<RankView> views_;
  std::vector<Peer> peers_;
};

/// Opens the port of a hub that the ranks in these places can reach. Returns "PORT ADDRESS ADDRESS ...", for join_hub;
/// empty, and `listener` closed, where that cannot be.
std::string open_hub(const std::vector<Place>& places, Descriptor& listener);

/// Joins the hub at `where`, over the loopback device on its own machine, which no firewall minds. Closed when no
/// address of it answers within some seconds.
Link join_hub(const std::string& where, bool same_machine, const std::string& token, int rank);

}  // namespace nsa
