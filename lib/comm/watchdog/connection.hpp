#pragma once
// TCP connections between the watchdogs of a job. They carry byte messages, never block, and use neither MPI nor NCCL.

#include <poll.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace nsa {

/// Owns a file descriptor.
class FileDescriptor {
 public:
  explicit FileDescriptor(int fd = -1) : fd_(fd) {}
  ~FileDescriptor() { reset(); }
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept {
    reset();
    fd_ = std::exchange(other.fd_, -1);
    return *this;
  }
  bool is_open() const { return fd_ >= 0; }
  int get() const { return fd_; }
  void reset();

 private:
  int fd_;
};

constexpr std::size_t max_message_bytes = 1 << 16;

/// One connection. It closes for good after an error, when the other side closes it, or when a received message is
/// longer than `max_receive_bytes`. It buffers a few messages at most, however much the other side sends.
class Connection {
 public:
  explicit Connection(FileDescriptor socket = FileDescriptor(), std::size_t max_receive_bytes = max_message_bytes)
      : socket_(std::move(socket)), max_receive_bytes_(max_receive_bytes) {}
  bool is_open() const { return socket_.is_open(); }
  bool has_unsent() const { return !out_.empty(); }
  pollfd poll_entry() const;                  ///< the events to poll for
  void send(const std::string& message);      ///< queues the message and sends as much as does not block
  void progress();                            ///< sends and receives as much as does not block, within the buffer
  std::optional<std::string> next_message();  ///< the next complete message received
  void accept_full_messages() { max_receive_bytes_ = max_message_bytes; }
  void close() { socket_.reset(); }

 private:
  void flush();
  FileDescriptor socket_;
  std::size_t max_receive_bytes_;
  std::string in_, out_;
};

enum class AddressScope { loopback, network };
/// Listens on a port chosen by the system, on the loopback device or on every IPv4 address. Closed on failure.
FileDescriptor listen_on(AddressScope scope, std::uint16_t& port);
/// Accepts one pending connection. Closed if there is none; `usable`: whether the listener can still accept others.
FileDescriptor accept_from(const FileDescriptor& listener, bool& usable);
/// IPv4 addresses of this host: those of the loopback device, or the others.
std::vector<std::string> own_addresses(AddressScope scope);
/// Connects within `seconds`. Closed on failure.
FileDescriptor connect_to(const std::string& address, std::uint16_t port, double seconds);
/// Waits up to `seconds` for input. Returns whether there is any.
bool wait_readable(const Connection& connection, double seconds);

}  // namespace nsa
