#include "comm/watchdog/protocol.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <random>
#include <type_traits>

namespace nsa {

namespace {

struct BeatHeader {
  std::int64_t told = 0;
  std::int64_t operations = 0;
  Activity place;
  char device[24] = {};
};
// No padding: nothing of this process' memory travels that is not meant to.
static_assert(std::has_unique_object_representations_v<BeatHeader> &&
              std::has_unique_object_representations_v<OperationRecord>);

constexpr std::size_t longest_text = 4096;  // of a failure or a verdict

std::string start_of(MessageKind kind) { return std::string(1, static_cast<char>(kind)); }

template <class T>
void put(std::string& message, const T* values, std::size_t count) {
  message.append(reinterpret_cast<const char*>(values), count * sizeof(T));
}

template <class T>
bool get(const std::string& message, std::size_t& at, T* values, std::size_t count) {
  if (at > message.size() || count > (message.size() - at) / sizeof(T)) return false;
  if (count > 0) std::memcpy(values, message.data() + at, count * sizeof(T));
  at += count * sizeof(T);
  return true;
}

template <std::size_t N>
void end_text(char (&text)[N]) {
  text[N - 1] = '\0';
}

}  // namespace

std::string new_token() {
  std::random_device random;
  return fmt::format("{:08x}{:08x}{:08x}{:08x}", random(), random(), random(), random());
}

std::string hello_message(const std::string& token, int rank) {
  return start_of(MessageKind::hello) + token + fmt::format(" {}", rank);
}

std::optional<int> read_hello(const std::string& message, const std::string& token) {
  const std::string start = start_of(MessageKind::hello) + token + ' ';
  if (token.empty() || !message.starts_with(start) || message.size() == start.size() ||
      message.size() > start.size() + 9 || message.find_first_not_of("0123456789", start.size()) != std::string::npos)
    return {};
  return std::stoi(message.substr(start.size()));
}

std::string welcome_message(const std::string& token) { return start_of(MessageKind::welcome) + token; }
std::string bye_message() { return start_of(MessageKind::bye); }

std::string beat_message(const RankView& view, const std::vector<OperationRecord>& news) {
  BeatHeader header{view.told, std::ssize(news), view.place, {}};
  std::strncpy(header.device, view.device.c_str(), sizeof header.device - 1);
  std::string message = start_of(MessageKind::beat);
  put(message, &header, 1);
  put(message, news.data(), news.size());
  return message + view.failure.substr(0, longest_text);
}

bool read_beat(const std::string& message, std::int64_t now, RankView& view) {
  std::size_t at = 1;
  BeatHeader header;
  if (!get(message, at, &header, 1)) return false;
  if (header.operations < 0 || header.operations > std::int64_t{operation_log_capacity}) return false;
  std::vector<OperationRecord> news(static_cast<std::size_t>(header.operations));
  if (!get(message, at, news.data(), news.size())) return false;
  for (OperationRecord& operation : news)
    end_text(operation.name), end_text(operation.phase), end_text(operation.stage);
  end_text(header.device), end_text(header.place.phase), end_text(header.place.stage);
  view.take(news);
  view.told = header.told;
  view.heard = now;
  view.place = header.place;
  view.device = header.device;
  if (view.failure.empty() && at < message.size()) view.failure = message.substr(at), view.changed = now;
  return true;
}

std::string end_message(const Verdict& verdict) {
  std::string message = start_of(MessageKind::end);
  constexpr std::size_t most_silent = 8192;  // a message has an end; who is not named in it stays as it is
  const auto count = static_cast<std::int32_t>(std::min(verdict.silent.size(), most_silent));
  put(message, &count, 1);
  put(message, verdict.silent.data(), static_cast<std::size_t>(count));
  return message + verdict.message.substr(0, longest_text);
}

Verdict read_end(const std::string& message) {
  std::size_t at = 1;
  std::int32_t count = 0;
  Verdict verdict;
  if (!get(message, at, &count, 1) || count < 0 || static_cast<std::size_t>(count) > message.size() / sizeof count)
    return verdict;
  verdict.silent.resize(static_cast<std::size_t>(count));
  if (!get(message, at, verdict.silent.data(), verdict.silent.size())) return {};
  verdict.message = message.substr(at);
  return verdict;
}

}  // namespace nsa
