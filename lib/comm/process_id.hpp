#pragma once
// Which process a rank is, for those that may have to signal it or to reach it.

#include <string>
#include <vector>

#include "comm/session.hpp"

namespace nsa {

struct Place {
  std::string host;
  std::string machine;  ///< equal where process numbers and the loopback device are the same ones
  std::string born;     ///< when the process was started: its number may come again, with this it does not
  int pid = 0;
};

std::string host_name();  ///< as the host calls itself; "?": not at all

Place own_place();

/// By rank. Collective.
std::vector<Place> all_places(const ControlComm& world);

/// Signals the process if it is one of this machine and still the same. Whether it was there.
bool signal_process(const Place& place, int which);

}  // namespace nsa
