#include "kernels/diagnostics/operation_log.hpp"

#include <time.h>

#include <array>
#include <atomic>
#include <cstring>

namespace nsa {

namespace {

// A sequence lock: one thread writes, another reads without a lock. A reader accepts a slot whose index is the same
// before and after reading; the index is 0 while the slot changes. Release and acquire on every field order the
// accesses.
template <class T>
class AtomicField {
 public:
  void set(T value) noexcept { value_.store(value, std::memory_order_release); }
  T get() const noexcept { return value_.load(std::memory_order_acquire); }

 private:
  std::atomic<T> value_{};
};

struct Slot {
  AtomicField<std::uint64_t> index, number, bytes, group;
  AtomicField<std::int64_t> begin, end;
  AtomicField<OperationKind> kind;
  AtomicField<const char*> name, phase, stage;
};

std::array<Slot, operation_log_capacity> slots;
AtomicField<std::uint64_t> newest_index;  // of the newest operation
std::uint64_t collectives = 0;
bool capturing = false;
AtomicField<const char*> phase, stage;

Slot& slot_of(std::uint64_t index) { return slots[index % operation_log_capacity]; }

void copy_name(char (&to)[20], const char* from) { std::strncpy(to, from ? from : "", sizeof to - 1); }

bool read(const Slot& slot, std::uint64_t index, OperationRecord& record) {
  if (slot.index.get() != index) return false;
  record.index = index;
  record.number = slot.number.get();
  record.bytes = slot.bytes.get();
  record.group = slot.group.get();
  record.begin = slot.begin.get();
  record.end = slot.end.get();
  record.kind = slot.kind.get();
  const char *name = slot.name.get(), *in_phase = slot.phase.get(), *in_stage = slot.stage.get();
  if (slot.index.get() != index) return false;
  copy_name(record.name, name);
  copy_name(record.phase, in_phase);
  copy_name(record.stage, in_stage);
  return true;
}

}  // namespace

std::int64_t coarse_now() noexcept {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
  return std::int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

Operation::Operation(OperationKind kind, const char* name, std::uint64_t bytes, std::uint64_t group,
                     const char* in_stage) noexcept {
  if (capturing) kind = OperationKind::wait;
  if (kind != OperationKind::wait) ++collectives;
  const std::uint64_t index = newest_index.get() + 1;
  Slot& slot = slot_of(index);
  slot.index.set(0);
  slot.number.set(collectives);
  slot.bytes.set(bytes);
  slot.group.set(group);
  slot.begin.set(coarse_now());
  slot.end.set(0);
  slot.kind.set(kind);
  slot.name.set(name);
  slot.phase.set(phase.get());
  slot.stage.set(in_stage ? in_stage : stage.get());
  slot.index.set(index);
  newest_index.set(index);
}

Operation::~Operation() { slot_of(newest_index.get()).end.set(coarse_now()); }

PhaseScope::PhaseScope(const char* name) noexcept : outer_(phase.get()) {
  phase.set(name);
  stage.set(nullptr);
}
PhaseScope::~PhaseScope() { phase.set(outer_); }

CaptureScope::CaptureScope() noexcept { capturing = true; }
CaptureScope::~CaptureScope() { capturing = false; }

void set_stage(const char* name) noexcept { stage.set(name); }

Activity current_activity() {
  Activity activity;
  copy_name(activity.phase, phase.get());
  copy_name(activity.stage, stage.get());
  return activity;
}

std::vector<OperationRecord> recent_operations(std::uint64_t after) {
  const std::uint64_t last = newest_index.get();
  std::vector<OperationRecord> records;
  for (std::uint64_t index = last > operation_log_capacity ? last - operation_log_capacity + 1 : 1; index <= last;
       ++index) {
    OperationRecord record;
    if (index > after && read(slot_of(index), index, record)) records.push_back(record);
  }
  return records;
}

}  // namespace nsa
