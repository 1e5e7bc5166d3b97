#include "comm/watchdog/protocol.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <random>
#include <type_traits>

namespace nsa {

namespace {

struct HeartbeatHeader {
  std::int64_t sent_at = 0;
  std::int64_t operation_count = 0;
  Activity location;
  char device[24] = {};
};
// Without padding: a message contains no uninitialised memory.
static_assert(std::has_unique_object_representations_v<HeartbeatHeader> &&
              std::has_unique_object_representations_v<OperationRecord>);

constexpr std::size_t max_text_bytes = 4096;  // of a failure or a diagnosis

std::string prefix_of(MessageType type) { return std::string(1, static_cast<char>(type)); }

template <class T>
void append(std::string& message, const T* values, std::size_t count) {
  message.append(reinterpret_cast<const char*>(values), count * sizeof(T));
}

template <class T>
bool read(const std::string& message, std::size_t& offset, T* values, std::size_t count) {
  if (offset > message.size() || count > (message.size() - offset) / sizeof(T)) return false;
  if (count > 0) std::memcpy(values, message.data() + offset, count * sizeof(T));
  offset += count * sizeof(T);
  return true;
}

template <std::size_t N>
void null_terminate(char (&text)[N]) {
  text[N - 1] = '\0';
}

}  // namespace

std::string new_token() {
  std::random_device random;
  return fmt::format("{:08x}{:08x}{:08x}{:08x}", random(), random(), random(), random());
}

std::string encode_handshake_request(const std::string& token, int rank) {
  return prefix_of(MessageType::handshake_request) + token + fmt::format(" {}", rank);
}

std::optional<int> decode_handshake_request(const std::string& message, const std::string& token) {
  const std::string prefix = prefix_of(MessageType::handshake_request) + token + ' ';
  if (token.empty() || !message.starts_with(prefix) || message.size() == prefix.size() ||
      message.size() > prefix.size() + 9 || message.find_first_not_of("0123456789", prefix.size()) != std::string::npos)
    return {};
  return std::stoi(message.substr(prefix.size()));
}

std::string encode_handshake_reply(const std::string& token) { return prefix_of(MessageType::handshake_reply) + token; }
std::string encode_goodbye() { return prefix_of(MessageType::goodbye); }

std::string encode_heartbeat(const RankStatus& status, const std::vector<OperationRecord>& operations) {
  HeartbeatHeader header{status.sent_at, std::ssize(operations), status.location, {}};
  std::strncpy(header.device, status.device.c_str(), sizeof header.device - 1);
  std::string message = prefix_of(MessageType::heartbeat);
  append(message, &header, 1);
  append(message, operations.data(), operations.size());
  return message + status.failure.substr(0, max_text_bytes);
}

bool decode_heartbeat(const std::string& message, std::int64_t now, RankStatus& status) {
  std::size_t offset = 1;
  HeartbeatHeader header;
  if (!read(message, offset, &header, 1)) return false;
  if (header.operation_count < 0 || header.operation_count > std::int64_t{operation_log_capacity}) return false;
  std::vector<OperationRecord> operations(static_cast<std::size_t>(header.operation_count));
  if (!read(message, offset, operations.data(), operations.size())) return false;
  for (OperationRecord& operation : operations)
    null_terminate(operation.name), null_terminate(operation.phase), null_terminate(operation.stage);
  null_terminate(header.device), null_terminate(header.location.phase), null_terminate(header.location.stage);
  status.merge_operations(operations);
  status.sent_at = header.sent_at;
  status.received_at = now;
  status.location = header.location;
  status.device = header.device;
  if (status.failure.empty() && offset < message.size())
    status.failure = message.substr(offset), status.failed_at = now;
  return true;
}

std::string encode_end_job(const HangDiagnosis& diagnosis) {
  std::string message = prefix_of(MessageType::end_job);
  // Keeps the message below max_message_bytes. Further ranks are not signalled.
  constexpr std::size_t max_silent_ranks = 8192;
  const auto count = static_cast<std::int32_t>(std::min(diagnosis.silent_ranks.size(), max_silent_ranks));
  append(message, &count, 1);
  append(message, diagnosis.silent_ranks.data(), static_cast<std::size_t>(count));
  return message + diagnosis.message.substr(0, max_text_bytes);
}

HangDiagnosis decode_end_job(const std::string& message) {
  std::size_t offset = 1;
  std::int32_t count = 0;
  HangDiagnosis diagnosis;
  if (!read(message, offset, &count, 1) || count < 0 || static_cast<std::size_t>(count) > message.size() / sizeof count)
    return diagnosis;
  diagnosis.silent_ranks.resize(static_cast<std::size_t>(count));
  if (!read(message, offset, diagnosis.silent_ranks.data(), diagnosis.silent_ranks.size())) return {};
  diagnosis.message = message.substr(offset);
  return diagnosis;
}

}  // namespace nsa
