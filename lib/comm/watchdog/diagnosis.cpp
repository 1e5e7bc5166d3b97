#include "comm/watchdog/diagnosis.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <map>

namespace nsa {

namespace {

constexpr double second = 1e-9;

const OperationRecord* last_of(const RankView& view) {
  return view.operations.empty() ? nullptr : &view.operations.back();
}
const OperationRecord* running_of(const RankView& view) {
  const OperationRecord* last = last_of(view);
  return last && last->end == 0 ? last : nullptr;
}
std::uint64_t number_of(const RankView& view) { return view.operations.empty() ? 0 : view.operations.back().number; }

std::string in_place(const char* phase, const char* stage) {
  if (*phase == '\0') return {};
  return *stage == '\0' ? fmt::format(" [{}]", phase) : fmt::format(" [{}, {}]", phase, stage);
}

/// The ranks as they are at one moment.
class Court {
 public:
  Court(const std::vector<RankView>& ranks, std::int64_t now, const WatchTimes& times)
      : ranks_(ranks), now_(now), times_(times) {}

  std::optional<Verdict> lost_rank() const {
    for (std::size_t r = 0; r < ranks_.size(); ++r)
      if (ranks_[r].state == RankView::State::lost && now_ - ranks_[r].changed > times_.grace)
        return Verdict{{},
                       fmt::format("{} has ended without a word ({}); look at its output and at its host", name(r),
                                   last_words(r))};
    return {};
  }

  std::optional<Verdict> failed_rank() const {
    for (std::size_t r = 0; r < ranks_.size(); ++r)
      if (!ranks_[r].failure.empty() && now_ - ranks_[r].changed > times_.grace)
        return Verdict{{}, fmt::format("{}: {}", name(r), ranks_[r].failure)};
    return {};
  }

  // The first operation, among those known of all ranks, that is not the same one everywhere.
  std::optional<Verdict> mismatch(std::uint64_t& compared) const {
    std::uint64_t first = compared + 1, last = UINT64_MAX;
    for (const RankView& view : ranks_) {
      const auto oldest = std::find_if(view.operations.begin(), view.operations.end(), is_collective);
      if (oldest == view.operations.end()) return {};
      first = std::max(first, oldest->number);
      last = std::min(last, number_of(view));
    }
    for (std::uint64_t n = first; n <= last; ++n)
      if (auto verdict = mismatch_at(n)) return verdict;
    compared = std::max(compared, last);
    return {};
  }

  std::optional<Verdict> overdue() const {
    if (times_.deadline == 0) return {};
    std::size_t waiter = ranks_.size();
    std::int64_t longest = times_.deadline + times_.patience;
    for (std::size_t r = 0; r < ranks_.size(); ++r)
      if (active(r) && running_of(ranks_[r]) && age(r) > longest && !is_silent(r)) longest = age(r), waiter = r;
    if (waiter == ranks_.size()) return {};
    const std::vector<int> silent = select([&](std::size_t r) { return is_silent(r); });
    const std::vector<int> late = silent.empty() ? behind() : silent;
    const std::string deadline = fmt::format("the deadline is {:.4g} s", static_cast<double>(times_.deadline) * second);
    constexpr const char* advice = "look at its host and its device, or raise --deadline";
    if (late.empty())
      return Verdict{{},
                     fmt::format("{}: {}, and so are all ranks ({}); look at the network, or raise --deadline",
                                 name(waiter), doing(waiter), deadline)};
    if (late.size() == 1 && late[0] == static_cast<int>(waiter))
      return Verdict{{}, fmt::format("{} is late: {} ({}); {}", name(waiter), doing(waiter), deadline, advice)};
    return Verdict{silent,
                   fmt::format("{} ({}: {}; {}); {}", list_late(late), name(waiter), doing(waiter), deadline, advice)};
  }

 private:
  static bool is_collective(const OperationRecord& operation) { return operation.kind != OperationKind::wait; }

  bool active(std::size_t r) const { return ranks_[r].state == RankView::State::running; }
  bool is_silent(std::size_t r) const { return active(r) && now_ - ranks_[r].heard > times_.silence; }

  /// ns since the rank's newest operation began, or ended if it has.
  std::int64_t age(std::size_t r) const {
    const OperationRecord* last = last_of(ranks_[r]);
    if (!last) return 0;
    return ranks_[r].told - (last->end == 0 ? last->begin : last->end) + (now_ - ranks_[r].heard);
  }

  std::string name(std::size_t r) const {
    const RankView& view = ranks_[r];
    return fmt::format("rank {} ({}{}{})", view.rank, view.host, view.device.empty() ? "" : ", ", view.device);
  }

  std::string last_words(std::size_t r) const {
    const OperationRecord* last = last_of(ranks_[r]);
    if (!last) return "before its first operation";
    return fmt::format("{} {}", last->end == 0 ? "in" : "after", describe(*last));
  }

  std::string doing(std::size_t r) const {
    const double seconds = static_cast<double>(age(r)) * second;
    if (is_silent(r))
      return fmt::format("no answer for {:.0f} s, last seen {}", static_cast<double>(now_ - ranks_[r].heard) * second,
                         last_words(r));
    if (const OperationRecord* running = running_of(ranks_[r]))
      return fmt::format("{:.0f} s in {}", seconds, describe(*running));
    return fmt::format("{:.0f} s at work{} after #{}", seconds, in_place(ranks_[r].place.phase, ranks_[r].place.stage),
                       number_of(ranks_[r]));
  }

  template <class Condition>
  std::vector<int> select(Condition&& condition) const {
    std::vector<int> list;
    for (std::size_t r = 0; r < ranks_.size(); ++r)
      if (active(r) && condition(r)) list.push_back(static_cast<int>(r));
    return list;
  }

  /// Those that have begun fewer collectives than others; where all are equal, those that wait for their own device.
  std::vector<int> behind() const {
    std::uint64_t least = UINT64_MAX, most = 0;
    for (const int r : select([](std::size_t) { return true; })) {
      least = std::min(least, number_of(ranks_[r]));
      most = std::max(most, number_of(ranks_[r]));
    }
    if (least < most) return select([&](std::size_t r) { return number_of(ranks_[r]) == least; });
    return select([&](std::size_t r) {
      const OperationRecord* running = running_of(ranks_[r]);
      return running && running->kind == OperationKind::wait && age(r) > times_.deadline;
    });
  }

  std::string list_late(const std::vector<int>& late) const {
    constexpr std::size_t named = 4;
    std::string text;
    for (std::size_t i = 0; i < std::min(late.size(), named); ++i)
      text += fmt::format("{}{} is late: {}", i ? ", " : "", name(late[i]), doing(late[i]));
    if (late.size() > named) text += fmt::format(", and {} more", late.size() - named);
    return text;
  }

  const OperationRecord* collective(std::size_t r, std::uint64_t n) const {
    for (const OperationRecord& operation : ranks_[r].operations)
      if (operation.number == n && is_collective(operation)) return &operation;
    return nullptr;
  }

  static std::string label(const OperationRecord* operation) {
    if (!operation) return {};
    return operation->kind == OperationKind::exchange ? fmt::format("{}/{}", operation->name, operation->stage)
                                                      : operation->name;
  }

  std::optional<Verdict> mismatch_at(std::uint64_t n) const {
    std::map<std::string, std::vector<int>> labels;
    std::map<std::uint64_t, std::vector<int>> sizes;
    std::map<std::uint64_t, std::uint64_t> size_of_group;
    bool sizes_differ = false;
    for (std::size_t r = 0; r < ranks_.size(); ++r) {
      const OperationRecord* operation = collective(r, n);
      if (!operation) return {};
      labels[label(operation)].push_back(static_cast<int>(r));
      if (operation->kind != OperationKind::exchange) continue;
      sizes[operation->bytes].push_back(static_cast<int>(r));
      sizes_differ |= size_of_group.try_emplace(operation->group, operation->bytes).first->second != operation->bytes;
    }
    if (labels.size() > 1) return stray(n, labels, left_out(n, labels));
    if (sizes_differ) return stray(n, sizes, {});
    return {};
  }

  /// Of kinds that as many ranks stand for: one whose operations are those of the others, further on, left some out.
  std::vector<int> left_out(std::uint64_t n, const std::map<std::string, std::vector<int>>& labels) const {
    for (std::uint64_t shift = 1; shift < 4; ++shift)
      for (const auto& [own, members] : labels)
        for (const auto& [other, others] : labels)
          if (own != other && label(collective(others[0], n + shift)) == own) return members;
    return {};
  }

  /// The ranks outside of the largest class. Of equal classes the suspects stand outside; without any, nobody knows.
  template <class Key>
  std::optional<Verdict> stray(std::uint64_t n, const std::map<Key, std::vector<int>>& classes,
                               const std::vector<int>& suspects) const {
    std::size_t largest = 0;
    for (const auto& [key, members] : classes) largest = std::max(largest, members.size());
    std::vector<int> usual;
    bool tie = false;
    for (const auto& [key, members] : classes) {
      if (members.size() < largest || members == suspects) continue;
      tie = !usual.empty();
      usual = members;
    }
    std::string who, what;
    for (const auto& [key, members] : classes) {
      if (members == usual) continue;
      for (const int r : members) who += (who.empty() ? "" : ", ") + name(r);
      what += fmt::format("{}: {}, ", name(members[0]), with_bytes(*collective(members[0], n)));
    }
    what += fmt::format("{}: {}", name(usual[0]), with_bytes(*collective(usual[0], n)));
    return Verdict{
        {},
        fmt::format("{} did not do the same as the others at operation #{} ({}); please report it with the operations",
                    tie ? who + " or " + name(usual[0]) : who, n, what)};
  }

  static std::string with_bytes(const OperationRecord& operation) {
    return fmt::format("{} of {} bytes", describe(operation), operation.bytes);
  }

  const std::vector<RankView>& ranks_;
  const std::int64_t now_;
  const WatchTimes& times_;
};

}  // namespace

void RankView::take(const std::vector<OperationRecord>& news) {
  if (news.empty()) return;
  std::erase_if(operations, [&](const OperationRecord& known) { return known.index >= news.front().index; });
  operations.insert(operations.end(), news.begin(), news.end());
  if (operations.size() > operation_log_capacity)
    operations.erase(operations.begin(), operations.end() - static_cast<std::ptrdiff_t>(operation_log_capacity));
}

std::optional<Verdict> judge(const std::vector<RankView>& ranks, std::int64_t now, const WatchTimes& times,
                             std::uint64_t& compared) {
  const Court court(ranks, now, times);
  if (auto verdict = court.mismatch(compared)) return verdict;
  if (auto verdict = court.failed_rank()) return verdict;
  if (auto verdict = court.lost_rank()) return verdict;
  return court.overdue();
}

std::string describe(const OperationRecord& operation) {
  return fmt::format("{} {}#{}{}", operation.name, operation.kind == OperationKind::wait ? "after " : "",
                     operation.number, in_place(operation.phase, operation.stage));
}

}  // namespace nsa
