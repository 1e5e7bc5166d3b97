#include "comm/watchdog.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <mutex>
#include <random>
#include <sstream>
#include <thread>
#include <vector>

#include "comm/link.hpp"
#include "comm/verdict.hpp"
#include "kernels/operations.hpp"

namespace nsa {

namespace {

constexpr std::int64_t s = 1'000'000'000;   // ns
constexpr std::int64_t lost_grace = 3 * s;  // the launcher usually ends the job before
constexpr std::int64_t second_hub_waits = 3 * s;
constexpr std::int64_t alone_waits = 8 * s;   // a rank that no hub tells anything
constexpr std::int64_t end_waits = 3 * s;     // for the others' reports
constexpr std::int64_t report_waits = 4 * s;  // for a file system that may be what hangs
constexpr std::int64_t abort_waits = 10 * s;
constexpr std::int64_t pause = 5 * s;  // a thread that wakes so late was stopped with its process
constexpr double connect_seconds = 10;

/// Which process a rank is, for those that may signal it.
struct Place {
  std::string host, machine, born;
  int pid = 0;
};

std::string first_word_of(const std::string& path) {
  std::ifstream file(path);
  std::string word;
  file >> word;
  return word;
}

/// When the process was started, in clock ticks: a process id may come again, this with it does not.
std::string birth_of(int pid) {
  std::ifstream file(fmt::format("/proc/{}/stat", pid));
  std::string line;
  std::getline(file, line);
  std::istringstream words(line.substr(std::min(line.size(), line.rfind(')') + 1)));
  std::string word;
  for (int i = 0; i < 20; ++i) words >> word;  // field 22, the name being field 2
  return word.empty() ? "?" : word;
}

Place own_place() {
  char host[256] = "?", space[64] = "?";
  (void)gethostname(host, sizeof host - 1);
  if (const ssize_t n = readlink("/proc/self/ns/pid", space, sizeof space - 1); n > 0) space[n] = '\0';
  return {host, first_word_of("/proc/sys/kernel/random/boot_id") + space, birth_of(getpid()), getpid()};
}

std::string text_of(const Place& p) { return fmt::format("{} {} {} {}\n", p.host, p.machine, p.born, p.pid); }

/// A number that others cannot guess: a port is open to anyone.
std::string new_token() {
  std::random_device random;
  return fmt::format("{:08x}{:08x}{:08x}{:08x}", random(), random(), random(), random());
}

struct BeatHeader {
  std::int32_t rank = 0, operations = 0;
  std::int64_t told = 0;
  WorkPlace place;
  char device[24] = {};
};

template <class T>
void put(std::string& message, const T* values, std::size_t count = 1) {
  message.append(reinterpret_cast<const char*>(values), count * sizeof(T));
}

template <class T>
bool get(const std::string& message, std::size_t& at, T* values, std::size_t count = 1) {
  if (count > (message.size() - at) / sizeof(T)) return false;
  std::memcpy(values, message.data() + at, count * sizeof(T));
  at += count * sizeof(T);
  return true;
}

// Kinds of messages, their first byte.
constexpr char hello = 'h', welcome = 'w', beat = 'b', bye = 'y', end = 'e';

void write_whole(int file, const std::string& text) {
  for (std::size_t at = 0; at < text.size();) {
    const ssize_t n = ::write(file, text.data() + at, text.size() - at);
    if (n <= 0) return;
    at += static_cast<std::size_t>(n);
  }
}

struct Settings {
  std::int64_t deadline = 0;
  std::string path, device, failure;
  bool leaving = false;
  std::int64_t abort_at = 0;
  ExitCode abort_code = ExitCode::communication;
};

/// A rank as its hub knows it.
struct Peer {
  Link link;
  int rank = -1;  ///< until it has said so
};

}  // namespace

struct Watchdog::Impl {
  // Shared with the thread that owns the Watchdog, under the lock.
  std::mutex lock;
  Settings shared;
  std::vector<Link> new_hubs;
  Descriptor new_listener;
  std::vector<Place> new_places;
  std::string new_token;
  int new_rank = 0;
  bool news = false;

  std::array<int, 2> wake{-1, -1};  // a pipe
  std::thread thread;

  // The thread's own.
  Settings now_set;
  int rank = 0;
  bool hub = false;
  std::string token;
  std::vector<Place> places;
  std::vector<RankView> views;  // one, of this rank, where it is no hub
  std::vector<Peer> peers;      // of a hub
  std::vector<Link> hubs;       // this rank's connections to them
  Descriptor listener;
  std::uint64_t told_index = 0, compared = 0;
  std::int64_t resumed = 0;  // when this process last went on after a stop
  std::int64_t next_beat = 0;
  std::int64_t suspected = 0;  // when the second hub first saw a reason to end the job

  explicit Impl(double deadline) {
    shared.deadline = static_cast<std::int64_t>(deadline * s);
    if (pipe2(wake.data(), O_NONBLOCK | O_CLOEXEC) != 0) throw InternalError("pipe2 failed");
    views.resize(1);
    views[0].host = own_place().host;
    sigset_t all, before;  // signals are for the threads that have handlers in mind
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    thread = std::thread([this] { run(); });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  ~Impl() {
    change([](Settings& settings) { settings.leaving = true; });
    thread.join();
    for (const int end_of_pipe : wake) ::close(end_of_pipe);
  }

  template <class Change>
  void change(Change&& apply) {
    {
      const std::lock_guard guard(lock);
      apply(shared);
      news = true;
    }
    (void)!::write(wake[1], "!", 1);
  }

  RankView& own_view() { return views[hub ? static_cast<std::size_t>(rank) : 0]; }
  std::int64_t beat_every() const { return std::clamp(now_set.deadline / 10, s / 10, s); }

  WatchTimes times() const { return {now_set.deadline, 0, 7 * beat_every() / 2, lost_grace}; }

  // --- the loop

  void run() {
    for (std::int64_t before = coarse_now();;) {
      wait(next_beat - before);
      const std::int64_t now = coarse_now();
      if (now - before > s + pause) go_on_after_stop(now);
      before = now;
      take_news();
      listen_to_peers(now);
      listen_to_hubs(now);
      if (now_set.leaving) return leave();
      if (now_set.abort_at > 0 && now - now_set.abort_at > abort_waits) _exit(static_cast<int>(now_set.abort_code));
      if (now < next_beat) continue;
      next_beat = now + beat_every();
      tell(now);
      if (now_set.deadline == 0 || now_set.abort_at > 0) continue;
      if (hub) judge_all(now);
      judge_alone(now);
    }
  }

  void wait(std::int64_t ns) {
    std::vector<pollfd> list{{wake[0], POLLIN, 0}};
    if (listener.get() >= 0) list.push_back({listener.get(), POLLIN, 0});
    const auto watch = [&](const Link& link) {
      if (link.open())
        list.push_back({link.descriptor(), static_cast<short>(POLLIN | (link.has_output() ? POLLOUT : 0)), 0});
    };
    for (const Peer& peer : peers) watch(peer.link);
    for (const Link& link : hubs) watch(link);
    const std::int64_t milliseconds = std::clamp<std::int64_t>(ns / 1'000'000 + 1, 1, 1000);
    poll(list.data(), list.size(), static_cast<int>(milliseconds));
    char drain[64];
    while (::read(wake[0], drain, sizeof drain) > 0) {
    }
  }

  // Whoever stopped the whole job did not hang it: ages count from here.
  void go_on_after_stop(std::int64_t now) {
    resumed = now;
    for (RankView& view : views) view.heard = std::max(view.heard, now);
  }

  void take_news() {
    const std::lock_guard guard(lock);
    if (!std::exchange(news, false)) return;
    now_set = shared;
    next_beat = 0;
    if (!new_places.empty()) {
      places = std::move(new_places);
      rank = new_rank;
      token = new_token;
      views[0].rank = rank;
      if (new_listener.get() >= 0) become_hub();
    }
    for (Link& link : new_hubs) hubs.push_back(std::move(link));
    new_hubs.clear();
  }

  void become_hub() {
    listener = std::move(new_listener);
    hub = true;
    views.assign(places.size(), {});
    for (std::size_t r = 0; r < places.size(); ++r) {
      views[r].host = places[r].host;
      views[r].rank = static_cast<int>(r);
      views[r].state = RankView::State::left;  // until it says hello
    }
    own_view().state = RankView::State::running;
  }

  // --- what is heard

  void listen_to_peers(std::int64_t now) {
    for (Descriptor socket; listener.get() >= 0 && (socket = accept_from(listener)).get() >= 0;)
      peers.push_back({Link(std::move(socket)), -1});
    for (Peer& peer : peers) {
      peer.link.pump();
      while (const auto message = peer.link.next())
        if (!hear(peer, *message, now)) peer.link.close();
      if (peer.link.open() || peer.rank < 0) continue;
      RankView& view = views[static_cast<std::size_t>(peer.rank)];
      if (view.state == RankView::State::running) view.state = RankView::State::lost, view.changed = now;
    }
    std::erase_if(peers, [](const Peer& peer) { return !peer.link.open(); });
  }

  /// Whether the message is one of ours.
  bool hear(Peer& peer, const std::string& message, std::int64_t now) {
    std::size_t at = 1;
    if (message.empty()) return false;
    if (message[0] == hello) {
      std::int32_t who = -1;
      if (message.compare(1, token.size(), token) != 0) return false;
      at += token.size();
      if (!get(message, at, &who) || who < 0 || who >= std::ssize(views) || peer.rank >= 0) return false;
      peer.rank = who;
      views[static_cast<std::size_t>(who)].state = RankView::State::running;
      views[static_cast<std::size_t>(who)].heard = now;
      peer.link.send(welcome + token);
      return true;
    }
    if (peer.rank < 0) return false;
    RankView& view = views[static_cast<std::size_t>(peer.rank)];
    if (message[0] == bye) view.state = RankView::State::left;
    if (message[0] != beat) return true;
    BeatHeader header;
    if (!get(message, at, &header) || header.operations < 0 || header.operations > std::ssize(message)) return false;
    std::vector<OperationRecord> news_of_it(static_cast<std::size_t>(header.operations));
    if (!get(message, at, news_of_it.data(), news_of_it.size())) return false;
    view.take(news_of_it);
    view.told = header.told;
    view.heard = now;
    view.place = header.place;
    view.device.assign(header.device, strnlen(header.device, sizeof header.device));
    if (view.failure.empty() && at < message.size()) view.failure = message.substr(at), view.changed = now;
    return true;
  }

  void listen_to_hubs(std::int64_t) {
    for (Link& link : hubs) {
      link.pump();
      while (const auto message = link.next())
        if (!message->empty() && (*message)[0] == end) obey(*message);
    }
    std::erase_if(hubs, [](const Link& link) { return !link.open(); });
  }

  // --- what is told

  void tell(std::int64_t now) {
    std::vector<OperationRecord> recent = recent_operations(told_index > 0 ? told_index - 1 : 0);
    if (!recent.empty()) told_index = recent.back().index;
    if (!recent.empty() && recent.back().end == 0) recent.back().begin = std::max(recent.back().begin, resumed);
    RankView& view = own_view();
    view.take(recent);
    view.told = view.heard = now;
    view.place = current_place();
    view.device = now_set.device;
    if (view.failure.empty() && !now_set.failure.empty()) view.failure = now_set.failure, view.changed = now;
    BeatHeader header{rank, static_cast<std::int32_t>(recent.size()), now, view.place, {}};
    std::strncpy(header.device, now_set.device.c_str(), sizeof header.device - 1);
    std::string message(1, beat);
    put(message, &header);
    put(message, recent.data(), recent.size());
    message += now_set.failure;
    for (Link& link : hubs)
      if (!link.has_output()) link.send(message);  // a hub that reads nothing gets no more
  }

  void leave() {
    for (Link& link : hubs) link.send(std::string(1, bye));
    for (Peer& peer : peers) peer.link.send(std::string(1, bye));
  }

  // --- the end

  // The second hub leaves it to the first for a while: one of them speaks.
  void judge_all(std::int64_t now) {
    const auto verdict = judge(views, now, times(), compared);
    if (!verdict) return;
    if (suspected == 0) suspected = now;
    if (rank == 0 || now - suspected > second_hub_waits) end_job(*verdict);
  }

  // A hub that lives would have decided by now.
  void judge_alone(std::int64_t now) {
    const bool connected = !hubs.empty() || hub;
    std::vector<RankView> alone{own_view()};
    WatchTimes t = times();
    t.patience = connected ? alone_waits : 0;
    t.grace = connected ? lost_grace + alone_waits : 0;
    std::uint64_t none = UINT64_MAX;
    if (const auto verdict = judge(alone, now, t, none)) end_job(*verdict);
  }

  [[noreturn]] void end_job(const Verdict& verdict) {
    std::string text = verdict.message;
    if (!now_set.path.empty()) text += fmt::format("; last operations: {}.rank*.ops.json", now_set.path);
    std::string message(1, end);
    const auto count = static_cast<std::int32_t>(verdict.silent.size());
    put(message, &count);
    put(message, verdict.silent.data(), verdict.silent.size());
    message += verdict.message;
    for (Peer& peer : peers) peer.link.send(message);
    for (Link& link : hubs) link.send(message);
    signal_silent(verdict.silent, SIGCONT);
    report(
        [text, this, json = own_json(verdict.message)] {
          write_whole(STDERR_FILENO, "nsa: error: " + text + "\n");
          save(rank, json);
        },
        report_waits);
    const std::int64_t until = coarse_now() + end_waits;
    while (coarse_now() < until && std::any_of(peers.begin(), peers.end(), [](const Peer& p) { return p.rank >= 0; })) {
      wait(s / 10);
      listen_to_peers(coarse_now());
      std::erase_if(peers, [&](const Peer& p) { return p.rank >= 0 && views[p.rank].state == RankView::State::left; });
    }
    save_for_others(verdict.message);
    std::vector<int> dead = verdict.silent;
    std::erase_if(dead,
                  [&](int r) { return hub && views[static_cast<std::size_t>(r)].state == RankView::State::left; });
    signal_silent(dead, SIGKILL);
    _exit(static_cast<int>(ExitCode::communication));
  }

  [[noreturn]] void obey(const std::string& message) {
    std::size_t at = 1;
    std::int32_t count = 0;
    std::vector<int> silent;
    if (get(message, at, &count) && count >= 0 && count <= std::ssize(places)) {
      silent.resize(static_cast<std::size_t>(count));
      (void)get(message, at, silent.data(), silent.size());
    }
    signal_silent(silent, SIGCONT);
    report([this, json = own_json(message.substr(at))] { save(rank, json); }, report_waits);
    leave();
    // The one that judged prints first: the launcher may end all at the first that goes.
    for (const std::int64_t until = coarse_now() + end_waits + s; !hubs.empty() && coarse_now() < until;) {
      wait(s / 10);
      for (Link& link : hubs) link.pump();
      std::erase_if(hubs, [](const Link& link) { return !link.open(); });
    }
    if (signal_silent(silent, 0)) usleep(500'000);  // it ends by itself if it can
    signal_silent(silent, SIGKILL);
    _exit(static_cast<int>(ExitCode::communication));
  }

  /// Runs `work` in a thread of its own, which may hang, and waits for it for a while.
  template <class Work>
  static void report(Work work, std::int64_t ns) {
    const auto done = std::make_shared<std::atomic<bool>>(false);
    std::thread([work = std::move(work), done] {
      work();
      *done = true;
    }).detach();
    for (const std::int64_t until = coarse_now() + ns; !*done && coarse_now() < until;) usleep(5000);
  }

  std::string own_json(const std::string& verdict) {
    RankView view = own_view();
    view.take(recent_operations());
    return operations_json(rank, view, coarse_now(), verdict);
  }

  void save(int of, const std::string& json) const {
    if (now_set.path.empty()) return;
    const std::string name = fmt::format("{}.rank{}.ops.json", now_set.path, of);
    const Descriptor file(open(name.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
    if (file.get() >= 0) write_whole(file.get(), json);
  }

  // What those that cannot report have told before.
  void save_for_others(const std::string& verdict) {
    std::vector<std::pair<int, std::string>> list;
    for (std::size_t r = 0; hub && r < views.size(); ++r)
      if (static_cast<int>(r) != rank && views[r].state != RankView::State::left)
        list.emplace_back(
            r, operations_json(static_cast<int>(r), views[r], views[r].told + coarse_now() - views[r].heard, verdict));
    report(
        [this, list] {
          for (const auto& [r, json] : list) save(r, json);
        },
        report_waits);
  }

  /// Only processes of this machine and its process numbering, and only if they are still the same. Whether any is.
  bool signal_silent(const std::vector<int>& silent, int which) const {
    bool any = false;
    for (const int r : silent) {
      if (r < 0 || r >= std::ssize(places) || r == rank) continue;
      const Place& place = places[static_cast<std::size_t>(r)];
      if (place.machine != places[static_cast<std::size_t>(rank)].machine || birth_of(place.pid) != place.born)
        continue;
      any |= kill(place.pid, which) == 0;
    }
    return any;
  }
};

Watchdog::Watchdog(double deadline) : impl_(std::make_unique<Impl>(deadline)) {}
Watchdog::~Watchdog() = default;

namespace {

std::vector<Place> all_places(const Control& world, const Place& own) {
  std::string text;
  for (const std::string& line : world.gather(text_of(own))) text += line;
  std::istringstream lines(world.broadcast(text));
  std::vector<Place> places(static_cast<std::size_t>(world.size()));
  for (Place& place : places) lines >> place.host >> place.machine >> place.born >> place.pid;
  return places;
}

/// "port address address ..." of a hub; empty where it cannot listen.
std::string hub_address(Descriptor& listener) {
  std::uint16_t port = 0;
  listener = listen_anywhere(port);
  if (listener.get() < 0) return {};
  std::string text = std::to_string(port);
  for (const std::string& address : own_addresses()) text += " " + address;
  return text;
}

/// The addresses of another machine; of one's own the loopback, which no firewall minds.
Link join_hub(const std::string& where, bool same_machine, const std::string& token, std::int32_t rank) {
  std::istringstream words(where);
  std::uint16_t port = 0;
  words >> port;
  std::vector<std::string> addresses;
  for (std::string address; words >> address;)
    if (same_machine == address.starts_with("127.")) addresses.push_back(address);
  for (const std::string& address : addresses) {
    Link link(connect_to(address, port, connect_seconds));
    std::string message = hello + token;
    put(message, &rank);
    link.send(message);
    if (!link.open() || !wait_readable(link.descriptor(), connect_seconds)) continue;
    link.pump();
    if (link.open() && link.next() == welcome + token) return link;
  }
  return Link(Descriptor());
}

}  // namespace

std::string Watchdog::join(const Control& world) {
  const Place own = own_place();
  const std::vector<Place> places = all_places(world, own);
  const std::string token = world.broadcast(world.rank() == 0 ? new_token() : std::string());
  std::vector<int> hub_ranks{0};
  if (world.size() > 1) hub_ranks.push_back(world.size() - 1);
  Descriptor listener;
  const bool is_hub = world.rank() == 0 || world.rank() + 1 == world.size();
  const std::string address = is_hub ? hub_address(listener) : std::string();
  impl_->change([&](Settings&) {
    impl_->new_places = places;
    impl_->new_token = token;
    impl_->new_rank = world.rank();
    impl_->new_listener = std::move(listener);
  });
  std::string missed;
  for (const int hub : hub_ranks) {
    const std::string where = world.broadcast(address, hub);
    if (hub == world.rank()) continue;
    Link link = join_hub(where, places[static_cast<std::size_t>(hub)].machine == own.machine, token, world.rank());
    if (!link.open())
      missed = fmt::format("rank {} ({}) does not reach the watchdog of rank {} ({})", world.rank(), own.host, hub,
                           places[static_cast<std::size_t>(hub)].host);
    impl_->change([&](Settings&) { impl_->new_hubs.push_back(std::move(link)); });
  }
  for (const std::string& text : world.gather(missed))
    if (!text.empty()) return text + "; a hang will still end the job, but may be laid to the wrong rank";
  return {};
}

void Watchdog::set(double deadline, const std::string& result_path) {
  impl_->change([&](Settings& settings) {
    settings.deadline = static_cast<std::int64_t>(deadline * s);
    settings.path = result_path;
  });
}

void Watchdog::set_device(const std::string& name) {
  impl_->change([&](Settings& settings) { settings.device = name; });
}

void Watchdog::fail(const std::string& message) {
  bool on = false;
  impl_->change([&](Settings& settings) {
    settings.failure = message;
    on = settings.deadline > 0;
  });
  if (on) std::this_thread::sleep_for(std::chrono::nanoseconds(lost_grace + alone_waits + 10 * s));
}

void Watchdog::aborting(ExitCode code) {
  impl_->change([&](Settings& settings) {
    settings.abort_at = coarse_now();
    settings.abort_code = code;
  });
}

}  // namespace nsa
