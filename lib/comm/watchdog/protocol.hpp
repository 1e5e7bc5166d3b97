#pragma once
// The messages between the watchdogs of a job, as bytes. All ranks run the same program, so the byte order is the same.
// A receiver checks every length against the size of the message before it reads.

#include <optional>
#include <string>
#include <vector>

#include "comm/watchdog/diagnosis.hpp"

namespace nsa {

enum class MessageType : char {
  handshake_request = 'h',  ///< first message of a rank to a monitor: the token and its rank
  handshake_reply = 'w',    ///< answer of the monitor: the token
  heartbeat = 'b',          ///< rank to monitor: its new operations, phase and stage, device and failure
  goodbye = 'y',            ///< from a rank that ends normally
  end_job = 'e'             ///< monitor to all ranks: the job ends, and why
};

/// The message must not be empty.
inline MessageType type_of(const std::string& message) { return static_cast<MessageType>(message[0]); }

/// 128 random bits as text: they authenticate a rank, because any process may connect to a monitor's port.
std::string new_token();
constexpr std::size_t max_handshake_bytes = 64;  ///< longest message read before a connection is authenticated

std::string encode_handshake_request(const std::string& token, int rank);
/// The rank; nothing when the message is not a request with this token.
std::optional<int> decode_handshake_request(const std::string& message, const std::string& token);
std::string encode_handshake_reply(const std::string& token);
std::string encode_goodbye();

/// `status` without its operations, and the operations to report.
std::string encode_heartbeat(const RankStatus& status, const std::vector<OperationRecord>& operations);
/// Updates `status`, with `now` as the time of receipt. Returns false and changes nothing when the message is invalid.
bool decode_heartbeat(const std::string& message, std::int64_t now, RankStatus& status);

std::string encode_end_job(const HangDiagnosis& diagnosis);
HangDiagnosis decode_end_job(const std::string& message);

}  // namespace nsa
