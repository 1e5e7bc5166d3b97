#include "comm/watchdog/diagnosis.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <map>

namespace nsa {

namespace {

constexpr double seconds_per_ns = 1e-9;

const OperationRecord* last_operation(const RankStatus& status) {
  return status.operations.empty() ? nullptr : &status.operations.back();
}
const OperationRecord* running_operation(const RankStatus& status) {
  const OperationRecord* last = last_operation(status);
  return last && last->end == 0 ? last : nullptr;
}
std::uint64_t collectives_begun(const RankStatus& status) {
  return status.operations.empty() ? 0 : status.operations.back().number;
}

std::string in_brackets(const char* phase, const char* stage) {
  if (*phase == '\0') return {};
  return *stage == '\0' ? fmt::format(" [{}]", phase) : fmt::format(" [{}, {}]", phase, stage);
}

/// All ranks at one moment.
class JobSnapshot {
 public:
  JobSnapshot(const std::vector<RankStatus>& ranks, std::int64_t now, const Timeouts& timeouts)
      : ranks_(ranks), now_(now), timeouts_(timeouts) {}

  std::optional<HangDiagnosis> find_lost_rank() const {
    for (std::size_t r = 0; r < ranks_.size(); ++r)
      if (ranks_[r].state == RankStatus::State::lost && now_ - ranks_[r].failed_at > timeouts_.grace_period)
        return HangDiagnosis{
            {},
            fmt::format("{} ended unexpectedly ({}); look at its output and at its host", name(r), last_activity(r))};
    return {};
  }

  std::optional<HangDiagnosis> find_failed_rank() const {
    for (std::size_t r = 0; r < ranks_.size(); ++r)
      if (!ranks_[r].failure.empty() && now_ - ranks_[r].failed_at > timeouts_.grace_period)
        return HangDiagnosis{{}, fmt::format("{}: {}", name(r), ranks_[r].failure)};
    return {};
  }

  // The first collective, among those known of all ranks, that is not the same on all of them.
  std::optional<HangDiagnosis> find_mismatch(std::uint64_t& last_compared) const {
    std::uint64_t first = last_compared + 1, last = UINT64_MAX;
    for (const RankStatus& status : ranks_) {
      const auto oldest = std::find_if(status.operations.begin(), status.operations.end(), is_collective);
      if (oldest == status.operations.end()) return {};
      first = std::max(first, oldest->number);
      last = std::min(last, collectives_begun(status));
    }
    for (std::uint64_t n = first; n <= last; ++n)
      if (auto diagnosis = mismatch_at(n)) return diagnosis;
    last_compared = std::max(last_compared, last);
    return {};
  }

  std::optional<HangDiagnosis> find_overdue_operation() const {
    if (timeouts_.deadline == 0) return {};
    std::size_t waiter = ranks_.size();
    std::int64_t longest = timeouts_.deadline + timeouts_.deadline_margin;
    for (std::size_t r = 0; r < ranks_.size(); ++r)
      if (is_running(r) && running_operation(ranks_[r]) && age(r) > longest && !is_silent(r))
        longest = age(r), waiter = r;
    if (waiter == ranks_.size()) return {};
    const std::vector<int> silent = select([&](std::size_t r) { return is_silent(r); });
    if (timeouts_.starting && silent.empty()) return report_late_start(waiter);
    const std::vector<int> late = silent.empty() ? late_ranks() : silent;
    const std::string deadline = fmt::format("the deadline is {:.4g} s", deadline_seconds());
    constexpr const char* advice = "look at its host and its device, or raise --deadline";
    if (late.empty())
      return HangDiagnosis{{},
                           fmt::format("{}: {}, and so are all ranks ({}); look at the network, or raise --deadline",
                                       name(waiter), activity(waiter), deadline)};
    if (late.size() == 1 && late[0] == static_cast<int>(waiter))
      return HangDiagnosis{{},
                           fmt::format("{} is late: {} ({}); {}", name(waiter), activity(waiter), deadline, advice)};
    return HangDiagnosis{
        silent, fmt::format("{} ({}: {}; {}); {}", list_late(late), name(waiter), activity(waiter), deadline, advice)};
  }

 private:
  double deadline_seconds() const { return static_cast<double>(timeouts_.deadline) * seconds_per_ns; }

  /// A rank that ended before it connected is known by its absence; without a monitor not even that.
  HangDiagnosis report_late_start(std::size_t waiter) const {
    std::vector<int> absent;
    for (std::size_t r = 0; r < ranks_.size(); ++r)
      if (ranks_[r].state == RankStatus::State::finished && ranks_[r].received_at == 0)
        absent.push_back(static_cast<int>(r));
    std::string who = "not all ranks have started";
    if (!absent.empty()) who = list_named(absent, [&](int r) { return fmt::format("{} has not connected", name(r)); });
    return {{},
            fmt::format("{} ({}: {}; the start-up deadline is {:.4g} s); look at what the launcher and the other ranks "
                        "printed and at the network, or raise --startup-deadline",
                        who, name(waiter), activity(waiter), deadline_seconds())};
  }

  static bool is_collective(const OperationRecord& operation) { return operation.kind != OperationKind::wait; }

  bool is_running(std::size_t r) const { return ranks_[r].state == RankStatus::State::running; }
  bool is_silent(std::size_t r) const {
    return is_running(r) && now_ - ranks_[r].received_at > timeouts_.heartbeat_timeout;
  }

  /// ns since the newest operation of the rank began, or since it ended if it has.
  std::int64_t age(std::size_t r) const {
    const OperationRecord* last = last_operation(ranks_[r]);
    if (!last) return 0;
    return ranks_[r].sent_at - (last->end == 0 ? last->begin : last->end) + (now_ - ranks_[r].received_at);
  }

  std::string name(std::size_t r) const {
    const RankStatus& status = ranks_[r];
    return fmt::format("rank {} ({}{}{})", status.rank, status.host, status.device.empty() ? "" : ", ", status.device);
  }

  std::string last_activity(std::size_t r) const {
    const OperationRecord* last = last_operation(ranks_[r]);
    if (!last) return "before its first operation";
    return fmt::format("{} {}", last->end == 0 ? "in" : "after", describe(*last));
  }

  std::string activity(std::size_t r) const {
    const double seconds = static_cast<double>(age(r)) * seconds_per_ns;
    if (is_silent(r))
      return fmt::format("no answer for {:.0f} s, last seen {}",
                         static_cast<double>(now_ - ranks_[r].received_at) * seconds_per_ns, last_activity(r));
    if (const OperationRecord* running = running_operation(ranks_[r]))
      return fmt::format("{:.0f} s in {}", seconds, describe(*running));
    return fmt::format("{:.0f} s at work{} after #{}", seconds,
                       in_brackets(ranks_[r].location.phase, ranks_[r].location.stage), collectives_begun(ranks_[r]));
  }

  template <class Condition>
  std::vector<int> select(Condition&& condition) const {
    std::vector<int> selected;
    for (std::size_t r = 0; r < ranks_.size(); ++r)
      if (is_running(r) && condition(r)) selected.push_back(static_cast<int>(r));
    return selected;
  }

  /// The ranks that have begun the fewest collectives. If all have begun equally many: those that wait for their
  /// device.
  std::vector<int> late_ranks() const {
    std::uint64_t fewest = UINT64_MAX, most = 0;
    for (const int r : select([](std::size_t) { return true; })) {
      fewest = std::min(fewest, collectives_begun(ranks_[r]));
      most = std::max(most, collectives_begun(ranks_[r]));
    }
    if (fewest < most) return select([&](std::size_t r) { return collectives_begun(ranks_[r]) == fewest; });
    return select([&](std::size_t r) {
      const OperationRecord* running = running_operation(ranks_[r]);
      return running && running->kind == OperationKind::wait && age(r) > timeouts_.deadline;
    });
  }

  std::string list_late(const std::vector<int>& late) const {
    return list_named(late, [&](int r) { return fmt::format("{} is late: {}", name(r), activity(r)); });
  }

  template <class Describe>
  static std::string list_named(const std::vector<int>& members, Describe&& describe_rank) {
    constexpr std::size_t max_named = 4;
    std::string text;
    for (std::size_t i = 0; i < std::min(members.size(), max_named); ++i)
      text += (i ? ", " : "") + describe_rank(members[i]);
    if (members.size() > max_named) text += fmt::format(", and {} more", members.size() - max_named);
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

  std::optional<HangDiagnosis> mismatch_at(std::uint64_t n) const {
    std::map<std::string, std::vector<int>> ranks_by_label;
    std::map<std::uint64_t, std::vector<int>> ranks_by_size;
    std::map<std::uint64_t, std::uint64_t> size_of_group;
    bool sizes_differ = false;
    for (std::size_t r = 0; r < ranks_.size(); ++r) {
      const OperationRecord* operation = collective(r, n);
      if (!operation) return {};
      ranks_by_label[label(operation)].push_back(static_cast<int>(r));
      if (operation->kind != OperationKind::exchange) continue;
      ranks_by_size[operation->bytes].push_back(static_cast<int>(r));
      sizes_differ |= size_of_group.try_emplace(operation->group, operation->bytes).first->second != operation->bytes;
    }
    if (ranks_by_label.size() > 1) return report_mismatch(n, ranks_by_label, ranks_that_skipped(n, ranks_by_label));
    if (sizes_differ) return report_mismatch(n, ranks_by_size, {});
    return {};
  }

  /// The ranks whose collective `n` is one that the others run up to three collectives later: they skipped some.
  std::vector<int> ranks_that_skipped(std::uint64_t n,
                                      const std::map<std::string, std::vector<int>>& ranks_by_label) const {
    for (std::uint64_t shift = 1; shift < 4; ++shift)
      for (const auto& [own_label, members] : ranks_by_label)
        for (const auto& [other_label, others] : ranks_by_label)
          if (own_label != other_label && label(collective(others[0], n + shift)) == own_label) return members;
    return {};
  }

  /// Reports the ranks outside of the largest class. If several classes are largest, the suspects are outside; without
  /// suspects the message leaves open which class is at fault.
  template <class Key>
  std::optional<HangDiagnosis> report_mismatch(std::uint64_t n, const std::map<Key, std::vector<int>>& classes,
                                               const std::vector<int>& suspects) const {
    std::size_t largest = 0;
    for (const auto& [key, members] : classes) largest = std::max(largest, members.size());
    std::vector<int> majority;
    bool tie = false;
    for (const auto& [key, members] : classes) {
      if (members.size() < largest || members == suspects) continue;
      tie = !majority.empty();
      majority = members;
    }
    std::string names, details;
    for (const auto& [key, members] : classes) {
      if (members == majority) continue;
      for (const int r : members) names += (names.empty() ? "" : ", ") + name(r);
      details += fmt::format("{}: {}, ", name(members[0]), with_bytes(*collective(members[0], n)));
    }
    details += fmt::format("{}: {}", name(majority[0]), with_bytes(*collective(majority[0], n)));
    return HangDiagnosis{
        {},
        fmt::format("{} does not match the other ranks at operation #{} ({}); please report it with the operations",
                    tie ? names + " or " + name(majority[0]) : names, n, details)};
  }

  static std::string with_bytes(const OperationRecord& operation) {
    return fmt::format("{} of {} bytes", describe(operation), operation.bytes);
  }

  const std::vector<RankStatus>& ranks_;
  const std::int64_t now_;
  const Timeouts& timeouts_;
};

}  // namespace

void RankStatus::merge_operations(const std::vector<OperationRecord>& reported) {
  if (reported.empty()) return;
  std::erase_if(operations, [&](const OperationRecord& known) { return known.index >= reported.front().index; });
  operations.insert(operations.end(), reported.begin(), reported.end());
  if (operations.size() > operation_log_capacity)
    operations.erase(operations.begin(), operations.end() - static_cast<std::ptrdiff_t>(operation_log_capacity));
}

std::optional<HangDiagnosis> diagnose(const std::vector<RankStatus>& ranks, std::int64_t now, const Timeouts& timeouts,
                                      std::uint64_t& last_compared) {
  const JobSnapshot job(ranks, now, timeouts);
  if (auto diagnosis = job.find_mismatch(last_compared)) return diagnosis;
  if (auto diagnosis = job.find_failed_rank()) return diagnosis;
  if (auto diagnosis = job.find_lost_rank()) return diagnosis;
  return job.find_overdue_operation();
}

std::string describe(const OperationRecord& operation) {
  return fmt::format("{} {}#{}{}", operation.name, operation.kind == OperationKind::wait ? "after " : "",
                     operation.number, in_brackets(operation.phase, operation.stage));
}

}  // namespace nsa
