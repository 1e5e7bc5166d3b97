#include "comm/watchdog/connection.hpp"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace nsa {

namespace {

constexpr int socket_flags = SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC;

bool would_block() { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR; }

}  // namespace

void FileDescriptor::reset() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

pollfd Connection::poll_entry() const {
  return {socket_.get(), static_cast<short>(POLLIN | (out_.empty() ? 0 : POLLOUT)), 0};
}

void Connection::send(const std::string& message) {
  if (!is_open()) return;
  const auto length = static_cast<std::uint32_t>(message.size());
  out_.append(reinterpret_cast<const char*>(&length), sizeof length).append(message);
  flush();
}

void Connection::flush() {
  while (is_open() && !out_.empty()) {
    const ssize_t sent = ::send(socket_.get(), out_.data(), out_.size(), MSG_NOSIGNAL);
    if (sent > 0)
      out_.erase(0, static_cast<std::size_t>(sent));
    else if (would_block())
      return;
    else
      close();
  }
}

// Buffers at most one message of the largest size: a peer that sends without end neither fills memory nor keeps the
// thread from its other connections.
void Connection::progress() {
  flush();
  char buffer[16384];
  while (is_open() && in_.size() < max_receive_bytes_ + sizeof(std::uint32_t)) {
    const ssize_t got = ::recv(socket_.get(), buffer, sizeof buffer, 0);
    if (got > 0)
      in_.append(buffer, static_cast<std::size_t>(got));
    else if (got < 0 && would_block())
      return;
    else
      close();
  }
}

std::optional<std::string> Connection::next_message() {
  std::uint32_t length = 0;
  if (in_.size() < sizeof length) return {};
  std::memcpy(&length, in_.data(), sizeof length);
  if (length > max_receive_bytes_) {
    close();
    in_.clear();
    return {};
  }
  if (in_.size() < sizeof length + length) return {};
  std::string message = in_.substr(sizeof length, length);
  in_.erase(0, sizeof length + length);
  return message;
}

FileDescriptor listen_on(AddressScope scope, std::uint16_t& port) {
  FileDescriptor listener(::socket(AF_INET, socket_flags, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(scope == AddressScope::network ? INADDR_ANY : INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  auto* generic = reinterpret_cast<sockaddr*>(&address);
  if (!listener.is_open() || bind(listener.get(), generic, size) != 0 || listen(listener.get(), SOMAXCONN) != 0 ||
      getsockname(listener.get(), generic, &size) != 0)
    return FileDescriptor();
  port = ntohs(address.sin_port);
  return listener;
}

FileDescriptor accept_from(const FileDescriptor& listener, bool& usable) {
  FileDescriptor socket(accept4(listener.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
  usable = socket.is_open() || would_block() || errno == ECONNABORTED;
  return socket;
}

std::vector<std::string> own_addresses(AddressScope scope) {
  std::vector<std::string> addresses;
  ifaddrs* list = nullptr;
  if (getifaddrs(&list) != 0) return {};
  for (const ifaddrs* entry = list; entry; entry = entry->ifa_next) {
    const bool loopback = (entry->ifa_flags & IFF_LOOPBACK) != 0;
    if (!entry->ifa_addr || entry->ifa_addr->sa_family != AF_INET || !(entry->ifa_flags & IFF_UP)) continue;
    if (loopback != (scope == AddressScope::loopback)) continue;
    char text[INET_ADDRSTRLEN] = {};
    inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in*>(entry->ifa_addr)->sin_addr, text, sizeof text);
    addresses.push_back(text);
  }
  freeifaddrs(list);
  return addresses;
}

FileDescriptor connect_to(const std::string& address, std::uint16_t port, double seconds) {
  FileDescriptor socket(::socket(AF_INET, socket_flags, 0));
  sockaddr_in target{};
  target.sin_family = AF_INET;
  target.sin_port = htons(port);
  if (!socket.is_open() || inet_pton(AF_INET, address.c_str(), &target.sin_addr) != 1) return FileDescriptor();
  if (connect(socket.get(), reinterpret_cast<const sockaddr*>(&target), sizeof target) != 0) {
    pollfd entry{socket.get(), POLLOUT, 0};
    int error = errno;
    socklen_t size = sizeof error;
    if (error != EINPROGRESS || poll(&entry, 1, static_cast<int>(seconds * 1e3)) != 1 ||
        getsockopt(socket.get(), SOL_SOCKET, SO_ERROR, &error, &size) != 0 || error != 0)
      return FileDescriptor();
  }
  const int on = 1;
  setsockopt(socket.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  return socket;
}

bool wait_readable(const Connection& connection, double seconds) {
  pollfd entry = connection.poll_entry();
  return connection.is_open() && poll(&entry, 1, static_cast<int>(seconds * 1e3)) == 1;
}

}  // namespace nsa
