#include "comm/link.hpp"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace nsa {

namespace {

constexpr std::uint32_t longest_message = 1 << 20;  // what announces more is not one of us
constexpr int socket_flags = SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC;

bool would_wait() { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR; }

}  // namespace

void Descriptor::reset() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

void Link::send(const std::string& message) {
  if (!open()) return;
  const auto length = static_cast<std::uint32_t>(message.size());
  out_.append(reinterpret_cast<const char*>(&length), sizeof length).append(message);
  flush();
}

void Link::flush() {
  while (open() && !out_.empty()) {
    const ssize_t sent = ::send(socket_.get(), out_.data(), out_.size(), MSG_NOSIGNAL);
    if (sent > 0)
      out_.erase(0, static_cast<std::size_t>(sent));
    else if (would_wait())
      return;
    else
      close();
  }
}

void Link::pump() {
  flush();
  char piece[16384];
  while (open()) {
    const ssize_t got = ::recv(socket_.get(), piece, sizeof piece, 0);
    if (got > 0)
      in_.append(piece, static_cast<std::size_t>(got));
    else if (got < 0 && would_wait())
      return;
    else
      close();
  }
}

std::optional<std::string> Link::next() {
  std::uint32_t length = 0;
  if (in_.size() < sizeof length) return {};
  std::memcpy(&length, in_.data(), sizeof length);
  if (length > longest_message) {
    close();
    in_.clear();
    return {};
  }
  if (in_.size() < sizeof length + length) return {};
  std::string message = in_.substr(sizeof length, length);
  in_.erase(0, sizeof length + length);
  return message;
}

Descriptor listen_anywhere(std::uint16_t& port) {
  Descriptor listener(::socket(AF_INET, socket_flags, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_ANY);
  socklen_t size = sizeof address;
  auto* generic = reinterpret_cast<sockaddr*>(&address);
  if (listener.get() < 0 || bind(listener.get(), generic, size) != 0 || listen(listener.get(), SOMAXCONN) != 0 ||
      getsockname(listener.get(), generic, &size) != 0)
    return Descriptor();
  port = ntohs(address.sin_port);
  return listener;
}

Descriptor accept_from(const Descriptor& listener) {
  return Descriptor(accept4(listener.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
}

std::vector<std::string> own_addresses() {
  std::vector<std::string> outer, loop;
  ifaddrs* list = nullptr;
  if (getifaddrs(&list) != 0) return {};
  for (const ifaddrs* entry = list; entry; entry = entry->ifa_next) {
    if (!entry->ifa_addr || entry->ifa_addr->sa_family != AF_INET || !(entry->ifa_flags & IFF_UP)) continue;
    char text[INET_ADDRSTRLEN] = {};
    inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in*>(entry->ifa_addr)->sin_addr, text, sizeof text);
    (entry->ifa_flags & IFF_LOOPBACK ? loop : outer).push_back(text);
  }
  freeifaddrs(list);
  outer.insert(outer.end(), loop.begin(), loop.end());
  return outer;
}

Descriptor connect_to(const std::string& address, std::uint16_t port, double seconds) {
  Descriptor socket(::socket(AF_INET, socket_flags, 0));
  sockaddr_in target{};
  target.sin_family = AF_INET;
  target.sin_port = htons(port);
  if (socket.get() < 0 || inet_pton(AF_INET, address.c_str(), &target.sin_addr) != 1) return Descriptor();
  if (connect(socket.get(), reinterpret_cast<const sockaddr*>(&target), sizeof target) != 0) {
    pollfd waiting{socket.get(), POLLOUT, 0};
    int error = errno;
    socklen_t size = sizeof error;
    if (error != EINPROGRESS || poll(&waiting, 1, static_cast<int>(seconds * 1e3)) != 1 ||
        getsockopt(socket.get(), SOL_SOCKET, SO_ERROR, &error, &size) != 0 || error != 0)
      return Descriptor();
  }
  const int on = 1;
  setsockopt(socket.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  return socket;
}

bool wait_readable(int descriptor, double seconds) {
  pollfd waiting{descriptor, POLLIN, 0};
  return poll(&waiting, 1, static_cast<int>(seconds * 1e3)) == 1;
}

}  // namespace nsa
