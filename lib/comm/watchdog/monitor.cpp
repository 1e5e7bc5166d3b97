#include "comm/watchdog/monitor.hpp"

#include <algorithm>
#include <chrono>
#include <sstream>
#include <utility>

namespace nsa {

namespace {

constexpr std::int64_t handshake_timeout = 10'000'000'000;  // ns
constexpr double connect_seconds = 12, address_seconds = 4;

}  // namespace

Monitor::Monitor(FileDescriptor listener, std::string token, int rank, const std::vector<std::string>& hosts)
    : listener_(std::move(listener)), token_(std::move(token)), rank_(rank), ranks_(hosts.size()) {
  for (std::size_t r = 0; r < hosts.size(); ++r) {
    ranks_[r].rank = static_cast<int>(r);
    ranks_[r].host = hosts[r];
    ranks_[r].state = RankStatus::State::finished;
  }
  own_status().state = RankStatus::State::running;
}

void Monitor::progress(std::int64_t now) {
  accept_connections(now);
  for (Client& client : clients_) {
    client.connection.progress();
    while (const auto message = client.connection.next_message()) {
      if (handle_message(client, *message, now)) continue;
      client.connection.close();
      break;
    }
    if (client.connection.is_open() || client.rank < 0) continue;
    RankStatus& status = ranks_[static_cast<std::size_t>(client.rank)];
    if (status.state == RankStatus::State::running) status.state = RankStatus::State::lost, status.failed_at = now;
  }
  drop_unauthenticated(now);
  std::erase_if(clients_, [](const Client& client) { return !client.connection.is_open(); });
}

void Monitor::accept_connections(std::int64_t now) {
  const std::size_t max_clients = 2 * ranks_.size() + 64;
  for (std::size_t accepted = 0; accepted < max_clients && listener_.is_open(); ++accepted) {
    bool usable = true;
    FileDescriptor socket = accept_from(listener_, usable);
    if (!usable) return stop_accepting();  // no file descriptors are left: poll() would return for the port every time
    if (!socket.is_open()) return;
    if (clients_.size() < max_clients)
      clients_.push_back({Connection(std::move(socket), max_handshake_bytes), now, -1});
  }
}

void Monitor::drop_unauthenticated(std::int64_t now) {
  for (Client& client : clients_)
    if (client.rank < 0 && now - client.accepted_at > handshake_timeout) client.connection.close();
}

// Returns whether the message follows the protocol.
bool Monitor::handle_message(Client& client, const std::string& message, std::int64_t now) {
  if (message.empty()) return false;
  if (client.rank < 0) return handle_handshake(client, message, now);
  RankStatus& status = ranks_[static_cast<std::size_t>(client.rank)];
  if (type_of(message) == MessageType::goodbye) status.state = RankStatus::State::finished;
  return type_of(message) != MessageType::heartbeat || decode_heartbeat(message, now, status);
}

bool Monitor::handle_handshake(Client& client, const std::string& message, std::int64_t now) {
  const auto rank = decode_handshake_request(message, token_);
  if (!rank || *rank >= std::ssize(ranks_)) return false;
  for (Client& other : clients_)  // after a timeout the rank connects again, by another address
    if (other.rank == *rank) other.rank = -1, other.connection.close();
  client.rank = *rank;
  client.connection.accept_full_messages();
  RankStatus& status = ranks_[static_cast<std::size_t>(*rank)];
  status.state = RankStatus::State::running;
  status.received_at = now;
  client.connection.send(encode_handshake_reply(token_));
  return true;
}

void Monitor::send_to_all(const std::string& message) {
  for (Client& client : clients_)
    if (client.rank >= 0) client.connection.send(message);
}

bool Monitor::has_running_ranks() const {
  return std::any_of(clients_.begin(), clients_.end(), [&](const Client& client) {
    return client.rank >= 0 && client.connection.is_open() &&
           ranks_[static_cast<std::size_t>(client.rank)].state != RankStatus::State::finished;
  });
}

void Monitor::append_poll_entries(std::vector<pollfd>& entries) const {
  if (listener_.is_open()) entries.push_back({listener_.get(), POLLIN, 0});
  for (const Client& client : clients_) entries.push_back(client.connection.poll_entry());
}

std::string open_monitor_port(const std::vector<ProcessId>& processes, FileDescriptor& listener) {
  const bool one_machine = std::all_of(processes.begin(), processes.end(), [&](const ProcessId& process) {
    return process.machine == processes[0].machine;
  });
  std::uint16_t port = 0;
  listener = listen_on(one_machine ? AddressScope::loopback : AddressScope::network, port);
  if (!listener.is_open()) return {};
  std::string endpoint = std::to_string(port);
  for (const AddressScope scope : {AddressScope::loopback, AddressScope::network})
    for (const std::string& address : own_addresses(scope))
      if (scope == AddressScope::loopback || !one_machine) endpoint += " " + address;
  return endpoint;
}

Connection connect_to_monitor(const std::string& endpoint, bool same_machine, const std::string& token, int rank) {
  std::istringstream words(endpoint);
  std::uint16_t port = 0;
  words >> port;
  const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(connect_seconds);
  for (std::string address; words >> address && std::chrono::steady_clock::now() < until;) {
    if (same_machine != address.starts_with("127.")) continue;
    Connection connection(connect_to(address, port, address_seconds));
    connection.send(encode_handshake_request(token, rank));
    if (!wait_readable(connection, address_seconds)) continue;
    connection.progress();
    if (connection.next_message() == encode_handshake_reply(token)) return connection;
  }
  return Connection();
}

}  // namespace nsa
