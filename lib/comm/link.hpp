#pragma once
// TCP between the watchdogs of a job: messages of bytes, never blocking, apart from MPI and NCCL.

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace nsa {

/// An owned file descriptor.
class Descriptor {
 public:
  explicit Descriptor(int fd = -1) : fd_(fd) {}
  ~Descriptor() { reset(); }
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    reset();
    fd_ = std::exchange(other.fd_, -1);
    return *this;
  }
  int get() const { return fd_; }
  void reset();

 private:
  int fd_;
};

/// One connection. After an error or the other side's end it is closed and stays so.
class Link {
 public:
  explicit Link(Descriptor socket) : socket_(std::move(socket)) {}
  bool open() const { return socket_.get() >= 0; }
  int descriptor() const { return socket_.get(); }
  bool has_output() const { return !out_.empty(); }
  void send(const std::string& message);  ///< queues, and sends what goes without waiting
  void pump();                            ///< sends and receives what goes without waiting
  std::optional<std::string> next();      ///< the next whole message received
  void close() { socket_.reset(); }

 private:
  void flush();
  Descriptor socket_;
  std::string in_, out_;
};

/// Listens on a port of the system's choice, on every IPv4 address. Closed (-1) when that fails.
Descriptor listen_anywhere(std::uint16_t& port);
/// A waiting connection, or closed (-1).
Descriptor accept_from(const Descriptor& listener);
/// IPv4 addresses of this host, loopback last.
std::vector<std::string> own_addresses();
/// Connects within `seconds`; closed (-1) when that fails.
Descriptor connect_to(const std::string& address, std::uint16_t port, double seconds);
/// Waits up to `seconds` for something to read; whether there is.
bool wait_readable(int descriptor, double seconds);

}  // namespace nsa
