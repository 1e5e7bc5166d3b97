// Who is at fault, from what the ranks tell: every case as a table of what each rank did.

#include <cstring>

#include "catch.hpp"
#include "comm/watchdog/diagnosis.hpp"
#include "comm/watchdog/operation_dump.hpp"

namespace {

using namespace nsa;

constexpr std::int64_t second = 1'000'000'000;
constexpr std::int64_t now = 1000 * second;
constexpr WatchTimes times{60 * second, 0, 5 * second, 3 * second};

/// Operations of one rank, by rising number; the last runs since `age` seconds unless it has ended then.
class Rank {
 public:
  explicit Rank(int rank) {
    view_.rank = rank;
    view_.host = "node" + std::to_string(rank / 2);
    view_.device = "GPU " + std::to_string(rank % 2);
    view_.told = view_.heard = now;
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
    view_.told -= seconds * second;
    view_.heard -= seconds * second;
    return *this;
  }
  Rank& lost(std::int64_t seconds) {
    view_.state = RankView::State::lost;
    view_.changed = now - seconds * second;
    return *this;
  }
  Rank& failed(const char* message, std::int64_t seconds) {
    view_.failure = message;
    view_.changed = now - seconds * second;
    return *this;
  }
  operator RankView() const { return view_; }

 private:
  Rank& add(OperationKind kind, const char* name, std::uint64_t number, const char* stage, std::uint64_t bytes,
            std::uint64_t group, std::int64_t begin, std::int64_t end) {
    OperationRecord o;
    o.index = view_.operations.size() + 1;
    o.number = number;
    o.bytes = bytes;
    o.group = group;
    o.begin = begin * second;
    o.end = end * second;
    o.kind = kind;
    std::strcpy(o.name, name);
    std::strcpy(o.phase, "decode");
    std::strcpy(o.stage, stage);
    view_.operations.push_back(o);
    return *this;
  }
  RankView view_;
};

std::string verdict_on(const std::vector<RankView>& ranks) {
  std::uint64_t compared = 0;
  const auto verdict = judge(ranks, now, times, compared);
  return verdict ? verdict->message : "";
}

bool says(const std::string& text, const std::string& part) {
  UNSCOPED_INFO(text);
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST_CASE("nobody is accused while the deadline holds", "[verdict]") {
  CHECK(verdict_on({Rank(0).did(1, "lse").waits(2, "partials", 59), Rank(1).did(1, "lse")}).empty());
  CHECK(verdict_on({Rank(0), Rank(1)}).empty());
  CHECK(verdict_on({Rank(0).did(1, "lse").silent(900), Rank(1).did(1, "lse")}).empty());  // nobody waits for it
  std::uint64_t compared = 0;
  const WatchTimes off{0, 0, 5 * second, 3 * second};
  CHECK_FALSE(judge({Rank(0).waits(1, "lse", 900), Rank(1)}, now, off, compared));
}

TEST_CASE("the rank behind the others is late, not those that wait for it", "[verdict]") {
  const std::string text = verdict_on({Rank(0).did(216, "lse").waits(217, "selected", 61), Rank(1).did(216, "lse"),
                                       Rank(2).did(216, "lse").waits(217, "selected", 60),
                                       Rank(3).did(216, "lse").waits(217, "selected", 60)});
  CHECK(says(text, "rank 1 (node0, GPU 1) is late: 100 s at work after #216 ("));
  CHECK(says(text, "rank 0 (node0, GPU 0): 61 s in all_gather #217 [decode, selected]; the deadline is 60 s)"));
}

TEST_CASE("a rank in an older collective is late", "[verdict]") {
  const std::string text = verdict_on({Rank(0).did(215, "lse").waits(216, "partials", 62),
                                       Rank(1).did(215, "lse").did(216, "partials").waits(217, "lse", 61)});
  CHECK(says(text, "rank 0 (node0, GPU 0) is late: 62 s in all_gather #216 [decode, partials]"));
}

TEST_CASE("a rank that does not answer is late, and is to be ended by its neighbours", "[verdict]") {
  std::uint64_t compared = 0;
  const auto verdict = judge({Rank(0).did(1, "lse").waits(2, "partials", 61), Rank(1).did(1, "lse"),
                              Rank(2).did(1, "lse").waits(2, "partials", 2).silent(59)},
                             now, times, compared);
  REQUIRE(verdict);
  CHECK(verdict->silent == std::vector<int>{2});
  CHECK(
      says(verdict->message,
           "rank 2 (node1, GPU 0) is late: no answer for 59 s, last seen in all_gather #2 [decode, partials] (rank 0"));
}

TEST_CASE("a device that never comes back is laid to its own rank", "[verdict]") {
  CHECK(says(
      verdict_on({Rank(0).did(9, "lse").waits_for_device(9, 61)}),
      "rank 0 (node0, GPU 0) is late: 61 s in device wait after #9 [decode, attend_sel] (the deadline is 60 s); "));
  CHECK(says(verdict_on({Rank(0).did(9, "lse").waits(10, "lse", 70), Rank(1).did(9, "lse").waits_for_device(9, 75)}),
             "rank 1 (node0, GPU 1) is late: 75 s in device wait after #9"));
}

TEST_CASE("where all ranks are in one place none of them is late", "[verdict]") {
  CHECK(says(verdict_on({Rank(0).waits(5, "lse", 61), Rank(1).waits(5, "lse", 61)}),
             "and so are all ranks (the deadline is 60 s); look at the network"));
}

TEST_CASE("a skipped collective is seen at once, and who skipped it", "[verdict]") {
  const auto whole = [](int rank) {
    return Rank(rank).did(10, "lse").did(11, "candidates").did(12, "partials").waits(13, "lse", 1);
  };
  const Rank skipped = Rank(1).did(10, "lse").did(11, "partials").waits(12, "lse", 1);
  CHECK(says(
      verdict_on({whole(0), skipped, whole(2)}),
      "rank 1 (node0, GPU 1) did not do the same as the others at operation #11 (rank 1 (node0, GPU 1): all_gather "
      "#11 [decode, partials] of 128 bytes, rank 0 (node0, GPU 0): all_gather #11 [decode, candidates]"));
  CHECK(says(verdict_on({whole(0), skipped}), "rank 1 (node0, GPU 1) did not do the same as the others"));
  CHECK(says(verdict_on({Rank(0).did(10, "lse").did(11, "partials").waits(12, "lse", 1), whole(1)}),
             "rank 0 (node0, GPU 0) did not do the same as the others"));
  CHECK(says(verdict_on({whole(0), Rank(1).did(10, "lse").control(11, "barrier"), whole(2)}),
             "rank 1 (node0, GPU 1) did not do the same as the others at operation #11"));
}

TEST_CASE("a size that differs within a group is seen, between groups it may", "[verdict]") {
  const auto rank = [](int r, std::uint64_t bytes, std::uint64_t group) {
    return Rank(r).did(10, "lse", 64, group).did(11, "lse", bytes, group);
  };
  CHECK(verdict_on({rank(0, 128, 7), rank(1, 128, 7), rank(2, 96, 8), rank(3, 96, 8)}).empty());
  CHECK(says(verdict_on({rank(0, 128, 7), rank(1, 64, 7), rank(2, 128, 8), rank(3, 128, 8)}),
             "rank 1 (node0, GPU 1) did not do the same as the others at operation #11"));
  CHECK(says(verdict_on({rank(0, 128, 7), rank(1, 64, 7)}),
             " or rank "));  // two ranks, two sizes: nobody knows
}

TEST_CASE("what was compared is not compared again", "[verdict]") {
  std::uint64_t compared = 0;
  const std::vector<RankView> ranks = {Rank(0).did(10, "lse").did(11, "lse"), Rank(1).did(10, "lse")};
  CHECK_FALSE(judge(ranks, now, times, compared));
  CHECK(compared == 10);
}

TEST_CASE("a rank that is gone, and a library that failed, after a moment for the others", "[verdict]") {
  CHECK(verdict_on({Rank(0).waits(5, "lse", 1), Rank(1).did(4, "lse").lost(2)}).empty());
  CHECK(says(verdict_on({Rank(0).waits(5, "lse", 1), Rank(1).did(4, "lse").lost(4)}),
             "rank 1 (node0, GPU 1) has ended without a word (after all_gather #4 [decode, lse])"));
  CHECK(verdict_on({Rank(0).failed("MPI_Allgather failed", 2), Rank(1)}).empty());
  CHECK(verdict_on({Rank(0).failed("MPI_Allgather failed", 4), Rank(1)}) ==
        "rank 0 (node0, GPU 0): MPI_Allgather failed");
}

TEST_CASE("a view keeps the last 64 operations, each once", "[verdict]") {
  RankView view;
  std::vector<OperationRecord> news(3);
  for (std::uint64_t round = 0; round < 40; ++round) {
    for (std::uint64_t i = 0; i < 3; ++i) news[i].index = 2 * round + i + 1;  // the last is told again: it has ended
    view.take(news);
  }
  REQUIRE(view.operations.size() == 64);
  for (std::size_t i = 0; i < 64; ++i) CHECK(view.operations[i].index == 81 - 63 + i);
}

TEST_CASE("the report of a rank is JSON", "[verdict]") {
  const RankView view = Rank(1).did(10, "lse").waits(11, "partials", 61);
  const std::string text = operations_json(view, now, "it \"hung\"\n");
  CHECK(says(text, R"("verdict": "it \"hung\"\u000a")"));
  CHECK(says(text, R"({"number": 10, "collective": true, "name": "all_gather", "phase": "decode", "stage": "lse", )"
                   R"("bytes": 128, "seconds_ago": 100.000, "seconds": 0.000},)"));
  CHECK(says(text, R"("seconds_ago": 61.000, "seconds": null})"));
}
