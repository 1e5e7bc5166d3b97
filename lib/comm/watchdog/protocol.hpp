#pragma once
// What the watchdogs of a job tell each other, as bytes: the same program runs on all ranks, of one byte order. What
// arrives is held against its size before it is read.

#include <optional>
#include <string>
#include <vector>

#include "comm/watchdog/diagnosis.hpp"

namespace nsa {

enum class MessageKind : char {
  hello = 'h',    ///< a rank to its hub, first of all: the token, and which rank it is
  welcome = 'w',  ///< the hub's answer: the token
  beat = 'b',     ///< a rank to its hub: where it is
  bye = 'y',      ///< a rank that leaves in order
  end = 'e'       ///< a hub to all: the job ends, and why
};

/// Of a message that is not empty.
inline MessageKind kind_of(const std::string& message) { return static_cast<MessageKind>(message[0]); }

/// 128 bits that others cannot guess, as text: a port is open to anyone.
std::string new_token();
constexpr std::size_t longest_hello = 64;  ///< all that is read from whom is not known yet

std::string hello_message(const std::string& token, int rank);
std::optional<int> read_hello(const std::string& message, const std::string& token);  ///< the rank
std::string welcome_message(const std::string& token);
std::string bye_message();

/// `view` without its operations, and those that are news.
std::string beat_message(const RankView& view, const std::vector<OperationRecord>& news);
/// Adds what it says to the view; false, and nothing, where it is not whole.
bool read_beat(const std::string& message, std::int64_t now, RankView& view);

std::string end_message(const Verdict& verdict);
Verdict read_end(const std::string& message);

}  // namespace nsa
