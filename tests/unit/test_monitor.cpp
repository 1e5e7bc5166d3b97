// The port of a monitor: which connections it accepts, what it allows unauthenticated ones, and how messages are
// decoded.

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>
#include <thread>

#include "catch.hpp"
#include "comm/watchdog/monitor.hpp"

namespace {

using namespace nsa;

constexpr std::int64_t second = 1'000'000'000;
const std::string token = "0123456789abcdef0123456789abcdef";

/// A monitor of four ranks, run by rank 0, on the loopback device.
struct Fixture {
  std::uint16_t port = 0;
  std::int64_t now = 1000 * second;
  Monitor monitor{listen_on(AddressScope::loopback, port), token, 0, {"a", "b", "c", "d"}};

  Connection connect() { return Connection(connect_to("127.0.0.1", port, 5)); }
  Connection authenticated(int rank) {
    Connection connection = connect();
    connection.send(encode_handshake_request(token, rank));
    REQUIRE(answer(connection) == encode_handshake_reply(token));
    return connection;
  }
  /// Runs the monitor until it answers, for a second at most. Returns the answer, or "".
  std::string answer(Connection& connection) {
    for (int i = 0; i < 100 && connection.is_open(); ++i) {
      monitor.progress(now);
      if (!wait_readable(connection, 0.01)) continue;
      connection.progress();
      if (const auto message = connection.next_message()) return *message;
    }
    return {};
  }
  /// Whether the monitor closes the connection.
  bool is_closed_by_monitor(Connection& connection) {
    answer(connection);
    return !connection.is_open();
  }
  RankStatus::State state(int rank) { return monitor.ranks()[static_cast<std::size_t>(rank)].state; }
  std::size_t connections() {
    std::vector<pollfd> list;
    monitor.append_poll_entries(list);
    return list.size() - 1;
  }
};

OperationRecord operation(std::uint64_t index) {
  OperationRecord o;
  o.index = o.number = index;
  std::strcpy(o.name, "all_gather");
  return o;
}

std::string raw(std::uint32_t length, const std::string& rest) {
  return std::string(reinterpret_cast<const char*>(&length), sizeof length) + rest;
}

void send_raw(const Connection& connection, const std::string& bytes) {
  REQUIRE(::send(connection.poll_entry().fd, bytes.data(), bytes.size(), MSG_NOSIGNAL) ==
          static_cast<ssize_t>(bytes.size()));
}

}  // namespace

TEST_CASE("the monitor takes the heartbeats of a rank with the token", "[monitor]") {
  Fixture f;
  CHECK(f.state(1) == RankStatus::State::finished);
  Connection connection = f.authenticated(1);
  CHECK(f.state(1) == RankStatus::State::running);
  RankStatus status;
  status.device = "GPU 3";
  status.sent_at = 7;
  connection.send(encode_heartbeat(status, {operation(41), operation(42)}));
  f.answer(connection);
  REQUIRE(f.monitor.ranks()[1].operations.size() == 2);
  CHECK(f.monitor.ranks()[1].operations[1].number == 42);
  CHECK(f.monitor.ranks()[1].device == "GPU 3");
  CHECK(f.monitor.ranks()[1].received_at == f.now);
  CHECK(f.monitor.has_running_ranks());
  connection.send(encode_goodbye());
  connection.close();
  f.monitor.progress(f.now);
  CHECK(f.state(1) == RankStatus::State::finished);
  CHECK_FALSE(f.monitor.has_running_ranks());
}

TEST_CASE("a connection that closes without a goodbye is a lost rank", "[monitor]") {
  Fixture f;
  f.authenticated(2).close();
  f.monitor.progress(f.now);
  CHECK(f.state(2) == RankStatus::State::lost);
  CHECK(f.monitor.ranks()[2].failed_at == f.now);
}

TEST_CASE("a rank that connects again by another address is not lost", "[monitor]") {
  Fixture f;
  Connection first = f.authenticated(2), again = f.authenticated(2);
  first.close();
  f.monitor.progress(f.now);
  CHECK(f.state(2) == RankStatus::State::running);
  CHECK(f.connections() == 1);
}

TEST_CASE("a connection without the token is closed and changes nothing", "[monitor]") {
  Fixture f;
  for (const std::string& message :
       {std::string(), std::string("GET / HTTP/1.1\r\n\r\n"),
        encode_handshake_request("00000000000000000000000000000000", 1), encode_handshake_request("", 1),
        encode_handshake_request(token, 4), encode_handshake_request(token, -1),
        encode_handshake_request(token, 1) + "x", "h" + token, "h" + token + " ", "h" + token + " 99999999999",
        encode_goodbye(), encode_heartbeat(RankStatus(), {operation(1)})}) {
    INFO(message);
    Connection connection = f.connect();
    connection.send(message);
    CHECK(f.is_closed_by_monitor(connection));
  }
  CHECK(f.connections() == 0);
  for (int rank = 1; rank < 4; ++rank) {
    CHECK(f.state(rank) == RankStatus::State::finished);
    CHECK(f.monitor.ranks()[static_cast<std::size_t>(rank)].operations.empty());
  }
}

TEST_CASE("a message length beyond the limit closes the connection", "[monitor]") {
  Fixture f;
  for (const std::uint32_t length : {65u, 1u << 20, 0xFFFFFFFFu}) {
    Connection connection = f.connect();
    send_raw(connection, raw(length, encode_handshake_request(token, 1)));
    CHECK(f.is_closed_by_monitor(connection));
  }
  Connection trusted = f.authenticated(1);
  send_raw(trusted, raw(static_cast<std::uint32_t>(max_message_bytes) + 1, "b"));
  CHECK(f.is_closed_by_monitor(trusted));
  CHECK(f.state(1) == RankStatus::State::lost);
}

TEST_CASE("unauthenticated connections are limited in number and time", "[monitor]") {
  Fixture f;
  std::vector<Connection> unauthenticated;
  for (int i = 0; i < 200; ++i) {
    unauthenticated.push_back(f.connect());
    f.monitor.progress(f.now);
  }
  CHECK(f.connections() <= 2 * 4 + 64);
  f.now += 11 * second;
  f.monitor.progress(f.now);
  CHECK(f.connections() == 0);
  f.authenticated(3);
}

TEST_CASE("the port is closed once all ranks have connected", "[monitor]") {
  Fixture f;
  Connection connection = f.authenticated(1);
  f.monitor.stop_accepting();
  CHECK_FALSE(f.connect().is_open());
  CHECK(f.monitor.has_running_ranks());
}

TEST_CASE("a monitor of ranks on one machine listens on the loopback device alone", "[monitor]") {
  const ProcessId here = own_process_id();
  ProcessId elsewhere = here;
  elsewhere.machine += "x";
  const auto bound_to = [](const FileDescriptor& listener) {
    sockaddr_in address{};
    socklen_t size = sizeof address;
    REQUIRE(getsockname(listener.get(), reinterpret_cast<sockaddr*>(&address), &size) == 0);
    return ntohl(address.sin_addr.s_addr);
  };
  FileDescriptor listener;
  const std::string one = open_monitor_port({here, here}, listener);
  CHECK(one.find(" 127.") != std::string::npos);
  CHECK(one.find(' ') == one.rfind(' '));
  CHECK(bound_to(listener) == INADDR_LOOPBACK);
  open_monitor_port({here, elsewhere}, listener);
  CHECK(bound_to(listener) == INADDR_ANY);
}

TEST_CASE("a rank connects to the monitor at the given address, and only with its token", "[monitor]") {
  Fixture f;
  const std::string endpoint = std::to_string(f.port) + " 192.0.2.1 127.0.0.1";
  std::thread rank([&] {
    CHECK_FALSE(connect_to_monitor(endpoint, true, "another token", 1).is_open());
    CHECK(connect_to_monitor(endpoint, true, token, 1).is_open());
    CHECK_FALSE(connect_to_monitor("1 127.0.0.1", true, token, 1).is_open());
    CHECK_FALSE(connect_to_monitor("", true, token, 1).is_open());
  });
  for (int i = 0; i < 500 && f.state(1) == RankStatus::State::finished; ++i) {
    f.monitor.progress(f.now);
    usleep(10000);
  }
  rank.join();
  CHECK(f.state(1) == RankStatus::State::running);
}

TEST_CASE("truncated and invalid messages are refused", "[monitor]") {
  RankStatus status, received;
  status.failure = "it broke";
  const std::string heartbeat = encode_heartbeat(status, {operation(1), operation(2)});
  REQUIRE(decode_heartbeat(heartbeat, 5, received));
  CHECK(received.failure == "it broke");
  CHECK(received.failed_at == 5);
  const std::size_t whole = heartbeat.size() - status.failure.size();
  for (std::size_t size = 1; size < whole; ++size) {
    RankStatus untouched;
    CHECK_FALSE(decode_heartbeat(heartbeat.substr(0, size), 5, untouched));
    CHECK(untouched.received_at == 0);
  }
  for (const std::int64_t operations : {std::int64_t{-1}, std::int64_t{65}, INT64_MAX}) {
    std::string invalid = heartbeat;
    std::memcpy(invalid.data() + 1 + sizeof(std::int64_t), &operations, sizeof operations);
    CHECK_FALSE(decode_heartbeat(invalid, 5, received));
  }
  std::string unterminated = heartbeat;  // names without a terminating null
  std::memset(unterminated.data() + 1 + 16, 'x', whole - 17);
  const std::int64_t operations = 2;
  std::memcpy(unterminated.data() + 9, &operations, sizeof operations);
  RankStatus ended;
  REQUIRE(decode_heartbeat(unterminated, 5, ended));
  CHECK(std::strlen(ended.operations[0].name) < sizeof ended.operations[0].name);
  CHECK(ended.device.size() < 24);
}

TEST_CASE("a diagnosis is sent and received complete", "[monitor]") {
  const HangDiagnosis diagnosis{{3, 5}, "rank 3 is late"};
  const HangDiagnosis read = decode_end_job(encode_end_job(diagnosis));
  CHECK(read.silent_ranks == diagnosis.silent_ranks);
  CHECK(read.message == diagnosis.message);
  CHECK(decode_end_job("e").silent_ranks.empty());
  CHECK(decode_end_job("e\xff\xff\xff\x7f").silent_ranks.empty());
  CHECK(encode_end_job({std::vector<int>(100000, 1), std::string(100000, 'x')}).size() < max_message_bytes);
}
