#include "comm/watchdog/monitor.hpp"

#include <algorithm>
#include <chrono>
#include <sstream>
#include <utility>

namespace nsa {

namespace {

constexpr std::int64_t stranger_stays = 10'000'000'000;  // ns
constexpr double join_seconds = 12, address_seconds = 4;

}  // namespace

Hub::Hub(Descriptor listener, std::string token, int rank, const std::vector<std::string>& hosts)
    : listener_(std::move(listener)), token_(std::move(token)), rank_(rank), views_(hosts.size()) {
  for (std::size_t r = 0; r < hosts.size(); ++r) {
    views_[r].rank = static_cast<int>(r);
    views_[r].host = hosts[r];
    views_[r].state = RankView::State::left;
  }
  own_view().state = RankView::State::running;
}

void Hub::listen(std::int64_t now) {
  accept_all(now);
  for (Peer& peer : peers_) {
    peer.link.pump();
    while (const auto message = peer.link.next()) {
      if (hear(peer, *message, now)) continue;
      peer.link.close();
      break;
    }
    if (peer.link.open() || peer.rank < 0) continue;
    RankView& view = views_[static_cast<std::size_t>(peer.rank)];
    if (view.state == RankView::State::running) view.state = RankView::State::lost, view.changed = now;
  }
  drop_silent_strangers(now);
  std::erase_if(peers_, [](const Peer& peer) { return !peer.link.open(); });
}

void Hub::accept_all(std::int64_t now) {
  const std::size_t most = 2 * views_.size() + 64;
  for (std::size_t taken = 0; taken < most && listener_.open(); ++taken) {
    bool more = true;
    Descriptor socket = accept_from(listener_, more);
    if (!more) return stop_accepting();  // no descriptors are left: polled on, the port would keep this thread busy
    if (!socket.open()) return;
    if (peers_.size() < most) peers_.push_back({Link(std::move(socket), longest_hello), now, -1});
  }
}

void Hub::drop_silent_strangers(std::int64_t now) {
  for (Peer& peer : peers_)
    if (peer.rank < 0 && now - peer.since > stranger_stays) peer.link.close();
}

// Whether the message is one of ours.
bool Hub::hear(Peer& peer, const std::string& message, std::int64_t now) {
  if (message.empty()) return false;
  if (peer.rank < 0) return welcome(peer, message, now);
  RankView& view = views_[static_cast<std::size_t>(peer.rank)];
  if (kind_of(message) == MessageKind::bye) view.state = RankView::State::left;
  return kind_of(message) != MessageKind::beat || read_beat(message, now, view);
}

bool Hub::welcome(Peer& peer, const std::string& message, std::int64_t now) {
  const auto rank = read_hello(message, token_);
  if (!rank || *rank >= std::ssize(views_)) return false;
  for (Peer& other : peers_)  // it gave up waiting there, and came by another address
    if (other.rank == *rank) other.rank = -1, other.link.close();
  peer.rank = *rank;
  peer.link.trust();
  RankView& view = views_[static_cast<std::size_t>(*rank)];
  view.state = RankView::State::running;
  view.heard = now;
  peer.link.send(welcome_message(token_));
  return true;
}

void Hub::tell_all(const std::string& message) {
  for (Peer& peer : peers_)
    if (peer.rank >= 0) peer.link.send(message);
}

bool Hub::hears_anyone() const {
  return std::any_of(peers_.begin(), peers_.end(), [&](const Peer& peer) {
    return peer.rank >= 0 && peer.link.open() &&
           views_[static_cast<std::size_t>(peer.rank)].state != RankView::State::left;
  });
}

void Hub::add_waiting(std::vector<pollfd>& list) const {
  if (listener_.open()) list.push_back({listener_.get(), POLLIN, 0});
  for (const Peer& peer : peers_) list.push_back(peer.link.waiting());
}

std::string open_hub(const std::vector<Place>& places, Descriptor& listener) {
  const bool one_machine =
      std::all_of(places.begin(), places.end(), [&](const Place& place) { return place.machine == places[0].machine; });
  std::uint16_t port = 0;
  listener = listen_on(one_machine ? Reach::this_machine : Reach::network, port);
  if (!listener.open()) return {};
  std::string text = std::to_string(port);
  for (const Reach reach : {Reach::this_machine, Reach::network})
    for (const std::string& address : own_addresses(reach))
      if (reach == Reach::this_machine || !one_machine) text += " " + address;
  return text;
}

Link join_hub(const std::string& where, bool same_machine, const std::string& token, int rank) {
  std::istringstream words(where);
  std::uint16_t port = 0;
  words >> port;
  const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(join_seconds);
  for (std::string address; words >> address && std::chrono::steady_clock::now() < until;) {
    if (same_machine != address.starts_with("127.")) continue;
    Link link(connect_to(address, port, address_seconds));
    link.send(hello_message(token, rank));
    if (!wait_readable(link, address_seconds)) continue;
    link.pump();
    if (link.next() == welcome_message(token)) return link;
  }
  return Link();
}

}  // namespace nsa
