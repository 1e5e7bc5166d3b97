#pragma once
// TCP between the watchdogs of a job: messages of bytes, never blocking, apart from MPI and NCCL.

#include <poll.h>

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
  bool open() const { return fd_ >= 0; }
  int get() const { return fd_; }
  void reset();

 private:
  int fd_;
};

constexpr std::size_t longest_message = 1 << 16;

/// One connection. After an error, the other side's end or a message longer than `longest` it is closed and stays so.
/// Holds a few messages at most, whatever the other side sends.
class Link {
 public:
  explicit Link(Descriptor socket = Descriptor(), std::size_t longest = longest_message)
      : socket_(std::move(socket)), longest_(longest) {}
  bool open() const { return socket_.open(); }
  bool has_output() const { return !out_.empty(); }
  pollfd waiting() const;                 ///< what to poll for
  void send(const std::string& message);  ///< queues, and sends what goes without waiting
  void pump();                            ///< sends and receives some of what goes without waiting
  std::optional<std::string> next();      ///< the next whole message received
  void trust() { longest_ = longest_message; }
  void close() { socket_.reset(); }

 private:
  void flush();
  Descriptor socket_;
  std::size_t longest_;
  std::string in_, out_;
};

enum class Reach { this_machine, network };
/// Listens on a port of the system's choice, on the loopback device or on every IPv4 address. Closed when that fails.
Descriptor listen_on(Reach reach, std::uint16_t& port);
/// A waiting connection, or closed; then `more` says whether others may come.
Descriptor accept_from(const Descriptor& listener, bool& more);
/// IPv4 addresses of this host: of its loopback device, or of the others.
std::vector<std::string> own_addresses(Reach reach);
/// Connects within `seconds`; closed when that fails.
Descriptor connect_to(const std::string& address, std::uint16_t port, double seconds);
/// Waits up to `seconds` for something to read; whether there is.
bool wait_readable(const Link& link, double seconds);

}  // namespace nsa
