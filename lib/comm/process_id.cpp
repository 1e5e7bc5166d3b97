#include "comm/process_id.hpp"

#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <sstream>

namespace nsa {

namespace {

std::string first_word_of(const std::string& path) {
  std::ifstream file(path);
  std::string word;
  file >> word;
  return word;
}

std::string target_of(const char* link) {
  char text[64] = "?";
  if (const ssize_t n = readlink(link, text, sizeof text - 1); n > 0) text[n] = '\0';
  return text;
}

// Field 22 of stat, the name in parentheses being field 2. "?": there is no such process.
std::string birth_of(int pid) {
  std::ifstream file(fmt::format("/proc/{}/stat", pid));
  std::string line;
  std::getline(file, line);
  std::istringstream words(line.substr(std::min(line.size(), line.rfind(')') + 1)));
  std::string word;
  for (int i = 0; i < 20; ++i) words >> word;
  return word.empty() ? "?" : word;
}

}  // namespace

std::string host_name() {
  char name[256] = "?";
  (void)gethostname(name, sizeof name - 1);
  return name;
}

Place own_place() {
  const std::string machine = first_word_of("/proc/sys/kernel/random/boot_id") + target_of("/proc/self/ns/pid") +
                              target_of("/proc/self/ns/net");
  return {host_name(), machine, birth_of(getpid()), getpid()};
}

std::vector<Place> all_places(const ControlComm& world) {
  const Place own = own_place();
  std::string text;
  for (const std::string& line : world.gather(fmt::format("{} {} {} {}\n", own.host, own.machine, own.born, own.pid)))
    text += line;
  std::istringstream lines(world.broadcast(text));
  std::vector<Place> places(static_cast<std::size_t>(world.size()));
  for (Place& place : places) lines >> place.host >> place.machine >> place.born >> place.pid;
  return places;
}

bool signal_process(const Place& place, int which) {
  static const std::string here = own_place().machine;
  return place.pid > 0 && place.machine == here && birth_of(place.pid) == place.born && kill(place.pid, which) == 0;
}

}  // namespace nsa
