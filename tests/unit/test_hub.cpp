// The port of a hub: who gets in, what strangers can do, and what the messages hold.

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

/// A hub of four ranks, rank 0's, on the loopback device.
struct Fixture {
  std::uint16_t port = 0;
  std::int64_t now = 1000 * second;
  Hub hub{listen_on(Reach::this_machine, port), token, 0, {"a", "b", "c", "d"}};

  Link connect() { return Link(connect_to("127.0.0.1", port, 5)); }
  Link joined(int rank) {
    Link link = connect();
    link.send(hello_message(token, rank));
    REQUIRE(answer(link) == welcome_message(token));
    return link;
  }
  /// Lets the hub work until it has answered, or for a moment.
  std::string answer(Link& link) {
    for (int i = 0; i < 100 && link.open(); ++i) {
      hub.listen(now);
      if (!wait_readable(link, 0.01)) continue;
      link.pump();
      if (const auto message = link.next()) return *message;
    }
    return {};
  }
  /// Whether the hub has closed the connection.
  bool shut_out(Link& link) {
    answer(link);
    return !link.open();
  }
  RankView::State state(int rank) { return hub.views()[static_cast<std::size_t>(rank)].state; }
  std::size_t connections() {
    std::vector<pollfd> list;
    hub.add_waiting(list);
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

void send_raw(const Link& link, const std::string& bytes) {
  REQUIRE(::send(link.waiting().fd, bytes.data(), bytes.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(bytes.size()));
}

}  // namespace

TEST_CASE("a rank with the token is heard", "[hub]") {
  Fixture f;
  CHECK(f.state(1) == RankView::State::left);
  Link link = f.joined(1);
  CHECK(f.state(1) == RankView::State::running);
  RankView view;
  view.device = "GPU 3";
  view.told = 7;
  link.send(beat_message(view, {operation(41), operation(42)}));
  f.answer(link);
  REQUIRE(f.hub.views()[1].operations.size() == 2);
  CHECK(f.hub.views()[1].operations[1].number == 42);
  CHECK(f.hub.views()[1].device == "GPU 3");
  CHECK(f.hub.views()[1].heard == f.now);
  CHECK(f.hub.hears_anyone());
  link.send(bye_message());
  link.close();
  f.hub.listen(f.now);
  CHECK(f.state(1) == RankView::State::left);
  CHECK_FALSE(f.hub.hears_anyone());
}

TEST_CASE("a connection that ends without a word is a lost rank", "[hub]") {
  Fixture f;
  f.joined(2).close();
  f.hub.listen(f.now);
  CHECK(f.state(2) == RankView::State::lost);
  CHECK(f.hub.views()[2].changed == f.now);
}

TEST_CASE("a rank that comes again by another address is not lost", "[hub]") {
  Fixture f;
  Link first = f.joined(2), again = f.joined(2);
  first.close();
  f.hub.listen(f.now);
  CHECK(f.state(2) == RankView::State::running);
  CHECK(f.connections() == 1);
}

TEST_CASE("who has no token is shut out and changes nothing", "[hub]") {
  Fixture f;
  for (const std::string& message :
       {std::string(), std::string("GET / HTTP/1.1\r\n\r\n"), hello_message("00000000000000000000000000000000", 1),
        hello_message("", 1), hello_message(token, 4), hello_message(token, -1), hello_message(token, 1) + "x",
        "h" + token, "h" + token + " ", "h" + token + " 99999999999", bye_message(),
        beat_message(RankView(), {operation(1)})}) {
    INFO(message);
    Link link = f.connect();
    link.send(message);
    CHECK(f.shut_out(link));
  }
  CHECK(f.connections() == 0);
  for (int rank = 1; rank < 4; ++rank) {
    CHECK(f.state(rank) == RankView::State::left);
    CHECK(f.hub.views()[static_cast<std::size_t>(rank)].operations.empty());
  }
}

TEST_CASE("a stranger's length is not believed", "[hub]") {
  Fixture f;
  for (const std::uint32_t length : {65u, 1u << 20, 0xFFFFFFFFu}) {
    Link link = f.connect();
    send_raw(link, raw(length, hello_message(token, 1)));
    CHECK(f.shut_out(link));
  }
  Link trusted = f.joined(1);
  send_raw(trusted, raw(static_cast<std::uint32_t>(longest_message) + 1, "b"));
  CHECK(f.shut_out(trusted));
  CHECK(f.state(1) == RankView::State::lost);
}

TEST_CASE("strangers are few and do not stay", "[hub]") {
  Fixture f;
  std::vector<Link> strangers;
  for (int i = 0; i < 200; ++i) {
    strangers.push_back(f.connect());
    f.hub.listen(f.now);
  }
  CHECK(f.connections() <= 2 * 4 + 64);
  f.now += 11 * second;
  f.hub.listen(f.now);
  CHECK(f.connections() == 0);
  f.joined(3);
}

TEST_CASE("once all have joined nobody comes in", "[hub]") {
  Fixture f;
  Link link = f.joined(1);
  f.hub.stop_accepting();
  CHECK_FALSE(f.connect().open());
  CHECK(f.hub.hears_anyone());
}

TEST_CASE("a hub of ranks on one machine listens on its loopback device alone", "[hub]") {
  const Place here = own_place();
  Place elsewhere = here;
  elsewhere.machine += "x";
  const auto bound_to = [](const Descriptor& listener) {
    sockaddr_in address{};
    socklen_t size = sizeof address;
    REQUIRE(getsockname(listener.get(), reinterpret_cast<sockaddr*>(&address), &size) == 0);
    return ntohl(address.sin_addr.s_addr);
  };
  Descriptor listener;
  const std::string one = open_hub({here, here}, listener);
  CHECK(one.find(" 127.") != std::string::npos);
  CHECK(one.find(' ') == one.rfind(' '));
  CHECK(bound_to(listener) == INADDR_LOOPBACK);
  open_hub({here, elsewhere}, listener);
  CHECK(bound_to(listener) == INADDR_ANY);
}

TEST_CASE("a rank joins the hub whose address it is told, and only with its token", "[hub]") {
  Fixture f;
  const std::string where = std::to_string(f.port) + " 192.0.2.1 127.0.0.1";
  std::thread rank([&] {
    CHECK_FALSE(join_hub(where, true, "another token", 1).open());
    CHECK(join_hub(where, true, token, 1).open());
    CHECK_FALSE(join_hub("1 127.0.0.1", true, token, 1).open());
    CHECK_FALSE(join_hub("", true, token, 1).open());
  });
  for (int i = 0; i < 500 && f.state(1) == RankView::State::left; ++i) {
    f.hub.listen(f.now);
    usleep(10000);
  }
  rank.join();
  CHECK(f.state(1) == RankView::State::running);
}

TEST_CASE("messages that are cut or lie are refused", "[hub]") {
  RankView view, told;
  view.failure = "it broke";
  const std::string beat = beat_message(view, {operation(1), operation(2)});
  REQUIRE(read_beat(beat, 5, told));
  CHECK(told.failure == "it broke");
  CHECK(told.changed == 5);
  const std::size_t whole = beat.size() - view.failure.size();
  for (std::size_t size = 1; size < whole; ++size) {
    RankView untouched;
    CHECK_FALSE(read_beat(beat.substr(0, size), 5, untouched));
    CHECK(untouched.heard == 0);
  }
  for (const std::int64_t operations : {std::int64_t{-1}, std::int64_t{65}, INT64_MAX}) {
    std::string lie = beat;
    std::memcpy(lie.data() + 1 + sizeof(std::int64_t), &operations, sizeof operations);
    CHECK_FALSE(read_beat(lie, 5, told));
  }
  std::string endless = beat;  // names without an end
  std::memset(endless.data() + 1 + 16, 'x', whole - 17);
  const std::int64_t operations = 2;
  std::memcpy(endless.data() + 9, &operations, sizeof operations);
  RankView ended;
  REQUIRE(read_beat(endless, 5, ended));
  CHECK(std::strlen(ended.operations[0].name) < sizeof ended.operations[0].name);
  CHECK(ended.device.size() < 24);
}

TEST_CASE("a verdict travels whole", "[hub]") {
  const Verdict verdict{{3, 5}, "rank 3 is late"};
  const Verdict read = read_end(end_message(verdict));
  CHECK(read.silent == verdict.silent);
  CHECK(read.message == verdict.message);
  CHECK(read_end("e").silent.empty());
  CHECK(read_end("e\xff\xff\xff\x7f").silent.empty());
  CHECK(end_message({std::vector<int>(100000, 1), std::string(100000, 'x')}).size() < longest_message);
}
