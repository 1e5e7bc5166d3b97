// The rank at fault, diagnosed from the operations that the ranks report. Every case lists the operations of each rank.

#include <cstring>

#include "catch.hpp"
#include "comm/watchdog/diagnosis.hpp"
#include "comm/watchdog/operation_dump.hpp"
#include "kernels/diagnostics/json.hpp"

namespace {

using namespace nsa;

constexpr std::int64_t second = 1'000'000'000;
constexpr std::int64_t now = 1000 * second;
constexpr Timeouts timeouts{60 * second, 0, 5 * second, 3 * second};

/// Operations of one rank, by rising number. `age`: seconds since the start of an operation that still runs.
class Rank {
 public:
  explicit Rank(int rank) {
    status_.rank = rank;
    status_.host = "node" + std::to_string(rank / 2);
    status_.device = "GPU " + std::to_string(rank % 2);
    status_.sent_at = status_.received_at = now;
  }
  Rank& did(std::uint64_t number, const char* stage, std::uint64_t bytes = 128, std::uint64_t group = 7) {
    return add(OperationKind::exchange, "all_gather", number, stage, bytes, group, 900, 900);
  }
  Rank& control(std::uint64_t number, const char* name) {
    return add(OperationKind::control, name, number, "", 8, 1, 900, 900);
  }
  Rank& waits(std::uint64_t number, const char* stage, std::int64_t age) {
    return add(OperationKind::exchange, "all_gather", number, stage, 128, 7, 1000 - age, 0);
  }
  Rank& waits_for_device(std::uint64_t number, std::int64_t age) {
    return add(OperationKind::wait, "device wait", number, "attend_sel", 0, 0, 1000 - age, 0);
  }
  Rank& silent(std::int64_t seconds) {
    status_.sent_at -= seconds * second;
    status_.received_at -= seconds * second;
    return *this;
  }
  Rank& lost(std::int64_t seconds) {
    status_.state = RankStatus::State::lost;
    status_.failed_at = now - seconds * second;
    return *this;
  }
  Rank& failed(const char* message, std::int64_t seconds) {
    status_.failure = message;
    status_.failed_at = now - seconds * second;
    return *this;
  }
  Rank& never_connected() {
    status_.state = RankStatus::State::finished;
    status_.received_at = 0;
    return *this;
  }
  operator RankStatus() const { return status_; }

 private:
  Rank& add(OperationKind kind, const char* name, std::uint64_t number, const char* stage, std::uint64_t bytes,
            std::uint64_t group, std::int64_t begin, std::int64_t end) {
    OperationRecord o;
    o.index = status_.operations.size() + 1;
    o.number = number;
    o.bytes = bytes;
    o.group = group;
    o.begin = begin * second;
    o.end = end * second;
    o.kind = kind;
    std::strcpy(o.name, name);
    std::strcpy(o.phase, "decode");
    std::strcpy(o.stage, stage);
    status_.operations.push_back(o);
    return *this;
  }
  RankStatus status_;
};

std::string message_for(const std::vector<RankStatus>& ranks, const Timeouts& limits = timeouts) {
  std::uint64_t last_compared = 0;
  const auto diagnosis = diagnose(ranks, now, limits, last_compared);
  return diagnosis ? diagnosis->message : "";
}

bool contains(const std::string& text, const std::string& part) {
  UNSCOPED_INFO(text);
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST_CASE("no rank is named before the deadline", "[diagnosis]") {
  CHECK(message_for({Rank(0).did(1, "lse").waits(2, "partials", 59), Rank(1).did(1, "lse")}).empty());
  CHECK(message_for({Rank(0), Rank(1)}).empty());
  CHECK(message_for({Rank(0).did(1, "lse").silent(900), Rank(1).did(1, "lse")}).empty());  // no rank waits for it
  std::uint64_t last_compared = 0;
  const Timeouts off{0, 0, 5 * second, 3 * second};
  CHECK_FALSE(diagnose({Rank(0).waits(1, "lse", 900), Rank(1)}, now, off, last_compared));
}

TEST_CASE("the rank with the fewest collectives is late, not those that wait for it", "[diagnosis]") {
  const std::string text = message_for({Rank(0).did(216, "lse").waits(217, "selected", 61), Rank(1).did(216, "lse"),
                                        Rank(2).did(216, "lse").waits(217, "selected", 60),
                                        Rank(3).did(216, "lse").waits(217, "selected", 60)});
  CHECK(contains(text, "rank 1 (node0, GPU 1) is late: 100 s at work after #216 ("));
  CHECK(contains(text, "rank 0 (node0, GPU 0): 61 s in all_gather #217 [decode, selected]; the deadline is 60 s)"));
}

TEST_CASE("a rank in an older collective is late", "[diagnosis]") {
  const std::string text = message_for({Rank(0).did(215, "lse").waits(216, "partials", 62),
                                        Rank(1).did(215, "lse").did(216, "partials").waits(217, "lse", 61)});
  CHECK(contains(text, "rank 0 (node0, GPU 0) is late: 62 s in all_gather #216 [decode, partials]"));
}

TEST_CASE("at the start the ranks that have not connected are named", "[diagnosis]") {
  Timeouts start = timeouts;
  start.starting = true;
  CHECK(message_for({Rank(0).waits(2, "", 59), Rank(1).never_connected()}, start).empty());
  CHECK(contains(message_for({Rank(0).waits(2, "", 61), Rank(1).never_connected()}, start),
                 "rank 1 (node0, GPU 1) has not connected (rank 0 (node0, GPU 0): 61 s in all_gather #2 [decode]; the "
                 "start-up deadline is 60 s); look at"));
  // A rank that knows only itself does not blame itself.
  CHECK(
      contains(message_for({Rank(3).waits(1, "", 61)}, start), "not all ranks have started (rank 3 (node1, GPU 1): "));
  CHECK(contains(message_for({Rank(0).waits(2, "", 61), Rank(1).did(1, "").silent(30)}, start),
                 "rank 1 (node0, GPU 1) is late: no answer"));
}

TEST_CASE("a rank without heartbeats is late, and the other ranks have to end it", "[diagnosis]") {
  std::uint64_t last_compared = 0;
  const auto diagnosis = diagnose({Rank(0).did(1, "lse").waits(2, "partials", 61), Rank(1).did(1, "lse"),
                                   Rank(2).did(1, "lse").waits(2, "partials", 2).silent(59)},
                                  now, timeouts, last_compared);
  REQUIRE(diagnosis);
  CHECK(diagnosis->silent_ranks == std::vector<int>{2});
  CHECK(contains(
      diagnosis->message,
      "rank 2 (node1, GPU 0) is late: no answer for 59 s, last seen in all_gather #2 [decode, partials] (rank 0"));
}

TEST_CASE("the rank of a device that never finishes is late", "[diagnosis]") {
  CHECK(contains(
      message_for({Rank(0).did(9, "lse").waits_for_device(9, 61)}),
      "rank 0 (node0, GPU 0) is late: 61 s in device wait after #9 [decode, attend_sel] (the deadline is 60 s); "));
  CHECK(
      contains(message_for({Rank(0).did(9, "lse").waits(10, "lse", 70), Rank(1).did(9, "lse").waits_for_device(9, 75)}),
               "rank 1 (node0, GPU 1) is late: 75 s in device wait after #9"));
}

TEST_CASE("if all ranks wait in the same operation, none is late", "[diagnosis]") {
  CHECK(contains(message_for({Rank(0).waits(5, "lse", 61), Rank(1).waits(5, "lse", 61)}),
                 "and so are all ranks (the deadline is 60 s); look at the network"));
}

TEST_CASE("a skipped collective is found before the deadline, with the rank that skipped it", "[diagnosis]") {
  const auto whole = [](int rank) {
    return Rank(rank).did(10, "lse").did(11, "candidates").did(12, "partials").waits(13, "lse", 1);
  };
  const Rank skipped = Rank(1).did(10, "lse").did(11, "partials").waits(12, "lse", 1);
  CHECK(contains(
      message_for({whole(0), skipped, whole(2)}),
      "rank 1 (node0, GPU 1) does not match the other ranks at operation #11 (rank 1 (node0, GPU 1): all_gather "
      "#11 [decode, partials] of 128 bytes, rank 0 (node0, GPU 0): all_gather #11 [decode, candidates]"));
  CHECK(contains(message_for({whole(0), skipped}), "rank 1 (node0, GPU 1) does not match the other ranks"));
  CHECK(contains(message_for({Rank(0).did(10, "lse").did(11, "partials").waits(12, "lse", 1), whole(1)}),
                 "rank 0 (node0, GPU 0) does not match the other ranks"));
  CHECK(contains(message_for({whole(0), Rank(1).did(10, "lse").control(11, "barrier"), whole(2)}),
                 "rank 1 (node0, GPU 1) does not match the other ranks at operation #11"));
}

TEST_CASE("sizes must match within a group, not between groups", "[diagnosis]") {
  const auto rank = [](int r, std::uint64_t bytes, std::uint64_t group) {
    return Rank(r).did(10, "lse", 64, group).did(11, "lse", bytes, group);
  };
  CHECK(message_for({rank(0, 128, 7), rank(1, 128, 7), rank(2, 96, 8), rank(3, 96, 8)}).empty());
  CHECK(contains(message_for({rank(0, 128, 7), rank(1, 64, 7), rank(2, 128, 8), rank(3, 128, 8)}),
                 "rank 1 (node0, GPU 1) does not match the other ranks at operation #11"));
  CHECK(contains(message_for({rank(0, 128, 7), rank(1, 64, 7)}),
                 " or rank "));  // two ranks, two sizes: either may be wrong
}

TEST_CASE("a collective is compared once", "[diagnosis]") {
  std::uint64_t last_compared = 0;
  const std::vector<RankStatus> ranks = {Rank(0).did(10, "lse").did(11, "lse"), Rank(1).did(10, "lse")};
  CHECK_FALSE(diagnose(ranks, now, timeouts, last_compared));
  CHECK(last_compared == 10);
}

TEST_CASE("a lost rank and a failed library are reported after the grace period", "[diagnosis]") {
  CHECK(message_for({Rank(0).waits(5, "lse", 1), Rank(1).did(4, "lse").lost(2)}).empty());
  CHECK(contains(message_for({Rank(0).waits(5, "lse", 1), Rank(1).did(4, "lse").lost(4)}),
                 "rank 1 (node0, GPU 1) ended unexpectedly (after all_gather #4 [decode, lse])"));
  CHECK(message_for({Rank(0).failed("MPI_Allgather failed", 2), Rank(1)}).empty());
  CHECK(message_for({Rank(0).failed("MPI_Allgather failed", 4), Rank(1)}) ==
        "rank 0 (node0, GPU 0): MPI_Allgather failed");
}

TEST_CASE("a status keeps the last 64 operations, each once", "[diagnosis]") {
  RankStatus status;
  std::vector<OperationRecord> reported(3);
  for (std::uint64_t round = 0; round < 40; ++round) {
    for (std::uint64_t i = 0; i < 3; ++i)
      reported[i].index = 2 * round + i + 1;  // the last is sent again: it has ended
    status.merge_operations(reported);
  }
  REQUIRE(status.operations.size() == 64);
  for (std::size_t i = 0; i < 64; ++i) CHECK(status.operations[i].index == 81 - 63 + i);
}

TEST_CASE("the operation dump of a rank is JSON", "[diagnosis]") {
  const RankStatus status = Rank(1).did(10, "lse").waits(11, "partials", 61);
  const Json dump = Json::parse(operations_json(status, now, "it \"hung\"\n"));
  CHECK(dump["rank"] == 1);
  CHECK(dump["verdict"] == "it \"hung\"\n");
  REQUIRE(dump["operations"].size() == 2);
  CHECK(json_text(dump["operations"][0]) ==
        R"({"number":10,"collective":true,"name":"all_gather","phase":"decode","stage":"lse","bytes":128,)"
        R"("seconds_ago":100.0,"seconds":0.0})");
  CHECK(dump["operations"][1]["seconds_ago"] == 61.0);
  CHECK(dump["operations"][1]["seconds"].is_null());
}
