// A model of the exchanges inside a sharded decode step (kernels/cuda/decode/sharded/exchange.cuh), searched over every
// interleaving. Ranks run steps one after the other. In a step a cluster a work item goes through exchanges: it stores
// a word into the slot of that item, parity and exchange on every peer, and reads the words of all peers, each once it
// bears the expected epoch. The words of the last exchange go to the rank alone that finishes the item. A store is
// delivered at any later time; stores to one word keep their order. A rank starts the next step when all of its work
// items have completed.

#include <cstdint>
#include <string>
#include <unordered_set>
#include <vector>

#include "catch.hpp"

namespace {

struct Protocol {
  int ranks = 2, items = 2, exchanges = 4, steps = 3;
  bool delays = true;         ///< stores are delivered later
  int parities = 2;           ///< slots of a word
  int waits = 4;              ///< exchanges whose words are waited for; the others are sent only
  int to_all = 4;             ///< exchanges whose words go to all ranks; the others to the one that finishes the item
  bool counts_epochs = true;  ///< false: every step uses the same epoch
  int resident = 2;           ///< clusters that run at the same time on a rank
  bool same_order = true;     ///< ranks start work items in the same order; false: odd ranks backwards
};

constexpr int max_ranks = 3, max_items = 2, max_exchanges = 4, max_parities = 2;

struct Cluster {
  std::uint8_t exchange = 0;  ///< as many exchanges are complete
  std::uint8_t sent = 0;      ///< the current one is sent
  std::uint8_t read = 0;      ///< bit per rank
};
struct Word {
  std::uint8_t step = 0;         ///< 1 + that of the delivered data; 0: none
  std::uint8_t pending[3] = {};  ///< stores under way, oldest first
};
struct State {
  std::uint8_t step[max_ranks] = {};
  Cluster clusters[max_ranks][max_items];
  Word words[max_ranks][max_ranks][max_items][max_exchanges][max_parities];  ///< owner, source
  std::string key() const { return {reinterpret_cast<const char*>(this), sizeof *this}; }
};

enum class Outcome { completes, hangs, reads_other_data };

class Search {
 public:
  explicit Search(const Protocol& protocol) : p_(protocol) {}
  Outcome run() {
    push(State{});
    while (!todo_.empty() && outcome_ == Outcome::completes) {
      const State s = todo_.back();
      todo_.pop_back();
      moved_ = false;
      expand(s);
      if (!moved_ && !complete(s)) outcome_ = Outcome::hangs;
    }
    return outcome_;
  }

 private:
  void push(const State& s) {
    moved_ = true;
    if (seen_.insert(s.key()).second) todo_.push_back(s);
  }
  bool complete(const State& s) const {
    for (int r = 0; r < p_.ranks; ++r)
      if (s.step[r] < p_.steps) return false;
    return true;
  }
  void expand(const State& s) {
    for (int r = 0; r < p_.ranks; ++r) {
      if (s.step[r] == p_.steps) continue;
      bool all = true;
      int running = 0;
      for (int i = 0; i < p_.items; ++i) {
        const int item = p_.same_order || r % 2 == 0 ? i : p_.items - 1 - i;
        if (s.clusters[r][item].exchange == p_.exchanges) continue;
        all = false;
        if (running++ < p_.resident) advance(s, r, item);
      }
      if (all) start_next_step(s, r);
    }
    if (p_.delays) deliver(s);
  }
  void start_next_step(State s, int r) {
    ++s.step[r];
    for (Cluster& c : s.clusters[r]) c = {};
    push(s);
  }
  void advance(const State& s, int r, int item) {
    const Cluster& c = s.clusters[r][item];
    if (!c.sent) return send(s, r, item);
    if (c.exchange >= p_.waits) return next_exchange(s, r, item);
    if (!receives(c.exchange, item, r)) return next_exchange(s, r, item);
    bool all = true;
    for (int peer = 0; peer < p_.ranks; ++peer)
      if (peer != r && (c.read >> peer & 1) == 0) all = false, read(s, r, item, peer);
    if (all) next_exchange(s, r, item);
  }
  void next_exchange(State s, int r, int item) {
    s.clusters[r][item] = {static_cast<std::uint8_t>(s.clusters[r][item].exchange + 1), 0, 0};
    push(s);
  }
  bool receives(int exchange, int item, int rank) const { return exchange < p_.to_all || item % p_.ranks == rank; }
  void send(State s, int r, int item) {
    for (int peer = 0; peer < p_.ranks; ++peer) {
      if (peer == r || !receives(s.clusters[r][item].exchange, item, peer)) continue;
      Word& word = s.words[peer][r][item][s.clusters[r][item].exchange][s.step[r] % p_.parities];
      const auto data = static_cast<std::uint8_t>(s.step[r] + 1);
      if (!p_.delays) {
        word.step = data;
        continue;
      }
      int at = 0;
      while (word.pending[at] != 0) ++at;
      word.pending[at] = data;
    }
    s.clusters[r][item].sent = 1;
    push(s);
  }
  void read(State s, int r, int item, int peer) {
    Cluster& c = s.clusters[r][item];
    const Word& word = s.words[r][peer][item][c.exchange][s.step[r] % p_.parities];
    if (word.step == 0 || (p_.counts_epochs && word.step != s.step[r] + 1)) return;
    if (word.step != s.step[r] + 1) outcome_ = Outcome::reads_other_data;
    c.read |= static_cast<std::uint8_t>(1 << peer);
    push(s);
  }
  void deliver(const State& s) {
    for (int owner = 0; owner < p_.ranks; ++owner)
      for (int source = 0; source < p_.ranks; ++source)
        for (int item = 0; item < p_.items; ++item)
          for (int x = 0; x < p_.exchanges; ++x)
            for (int parity = 0; parity < p_.parities; ++parity) {
              const Word& word = s.words[owner][source][item][x][parity];
              if (word.pending[0] == 0) continue;
              State next = s;
              next.words[owner][source][item][x][parity] = {word.pending[0], {word.pending[1], word.pending[2], 0}};
              push(next);
            }
  }

  const Protocol p_;
  Outcome outcome_ = Outcome::completes;
  bool moved_ = false;
  std::unordered_set<std::string> seen_;
  std::vector<State> todo_;
};

Outcome outcome(const Protocol& protocol) { return Search(protocol).run(); }

}  // namespace

TEST_CASE("sharded step: every interleaving completes with the data of its own step", "[step_protocol]") {
  CHECK(outcome({}) == Outcome::completes);
  CHECK(outcome({.to_all = 3}) == Outcome::completes);
  CHECK(outcome({.ranks = 3, .items = 1, .exchanges = 2, .waits = 2, .to_all = 1}) == Outcome::completes);
  CHECK(outcome({.ranks = 3, .items = 1}) == Outcome::completes);
  CHECK(outcome({.ranks = 3, .items = 2, .exchanges = 1, .delays = false, .waits = 1}) == Outcome::completes);
  CHECK(outcome({.ranks = 2, .items = 2, .exchanges = 2, .waits = 2, .resident = 1}) == Outcome::completes);
}

TEST_CASE("sharded step: the model finds what breaks the protocol", "[step_protocol]") {
  // One slot, and the last exchange is not waited for: a word is replaced before it is read.
  CHECK(outcome({.exchanges = 1, .parities = 1, .waits = 1}) == Outcome::hangs);
  CHECK(outcome({.exchanges = 2, .parities = 1, .waits = 1}) == Outcome::hangs);
  // Words go to one rank alone, and nothing else is waited for: a rank runs two steps ahead of it.
  CHECK(outcome({.items = 1, .exchanges = 1, .waits = 1, .to_all = 0}) == Outcome::hangs);
  CHECK(outcome({.counts_epochs = false}) == Outcome::reads_other_data);
  // Work items that are not all resident, started in different orders.
  CHECK(outcome({.exchanges = 1, .waits = 1, .resident = 1, .same_order = false}) == Outcome::hangs);
}
