#include "comm/session.hpp"

#include <ftw.h>
#include <mpi.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <numeric>
#include <optional>
#include <utility>

#include "comm/mpi_group.hpp"
#include "comm/process_id.hpp"
#include "kernels/diagnostics/fault_injection.hpp"
#include "kernels/diagnostics/operation_log.hpp"

namespace nsa {

void check_mpi(int code, const char* call) {
  if (code == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  MPI_Error_string(code, text, &length);
  throw UserError(std::string(call) + " failed (" + std::string(text, length) +
                      "); look at the other ranks, their hosts and the network",
                  ExitCode::communication);
}

namespace {

/// Open MPI's settings for a process without a launcher. It talks to nobody: it needs no shared memory (5.x leaves the
/// segment in /dev/shm), no search for networks, no daemon beside it and no session folder (4.x leaves it in TMPDIR).
void run_alone() {
  for (const auto& [name, value] : {std::pair{"OMPI_MCA_btl", "self"},
                                    {"OMPI_MCA_pml", "ob1"},
                                    {"OMPI_MCA_ess_singleton_isolated", "1"},
                                    {"OMPI_MCA_orte_create_session_dirs", "0"}})
    setenv(name, value, 0);
}

/// TMPDIR while MPI starts: a folder of its own, removed at the end. Open MPI 5.x makes a session folder for a process
/// without a launcher whatever its settings are, puts nothing there and leaves it behind. Where the folder cannot be
/// made, TMPDIR stays.
class SessionFolder {
 public:
  SessionFolder() {
    if (const char* set = std::getenv("TMPDIR")) before_ = set;
    path_ = before_.value_or("/tmp") + "/nsa-mpi-XXXXXX";
    if (mkdtemp(path_.data()))
      setenv("TMPDIR", path_.c_str(), 1);
    else
      path_.clear();
  }
  ~SessionFolder() {
    if (path_.empty()) return;
    before_ ? setenv("TMPDIR", before_->c_str(), 1) : unsetenv("TMPDIR");
    const auto remove_entry = [](const char* path, const struct stat*, int, FTW*) { return std::remove(path); };
    nftw(path_.c_str(), remove_entry, 8, FTW_DEPTH | FTW_PHYS);
  }
  SessionFolder(const SessionFolder&) = delete;
  SessionFolder& operator=(const SessionFolder&) = delete;

 private:
  std::optional<std::string> before_;
  std::string path_;
};

}  // namespace

MpiSession::MpiSession(int& argc, char**& argv) {
  const Operation operation(OperationKind::wait, "MPI_Init");
  int provided = 0;
  std::optional<SessionFolder> folder;
  if (!launched_rank()) {
    run_alone();
    folder.emplace();
  }
  check_mpi(MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &provided), "MPI_Init_thread");
  folder.reset();
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  if constexpr (fault::built) {
    int rank = 0;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    fault::set_rank(rank);
  }
}

MpiSession::~MpiSession() {
  if (std::uncaught_exceptions() > 0) return;
  const Operation operation(OperationKind::control, "MPI_Finalize");
  MPI_Finalize();
}

void MpiSession::abort(ExitCode code) {
  MPI_Abort(MPI_COMM_WORLD, static_cast<int>(code));
  std::abort();
}

std::string MpiSession::library_version() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING];
  int length = 0;
  check_mpi(MPI_Get_library_version(text, &length), "MPI_Get_library_version");
  const std::string version(text, length);
  return version.substr(0, version.find(','));
}

namespace {

// Equal on all ranks of a group, because they make the same splits in the same order. A hash: it differs from the id of
// another group except by chance.
std::uint64_t split_group_id(std::uint64_t parent, std::uint64_t split, int color) {
  return (parent * 0x9E3779B97F4A7C15u + split) * 0x9E3779B97F4A7C15u + static_cast<std::uint64_t>(color) + 1;
}

/// Logs a collective of the group from construction to destruction.
class ControlOperation : public Operation {
 public:
  ControlOperation(const ControlComm::Impl& group, const char* name, std::size_t bytes = 0)
      : Operation(OperationKind::control, name, bytes, group.group_id, "") {}
};

}  // namespace

ControlComm::Impl::Impl(MPI_Comm owned, std::uint64_t id) : comm(owned), group_id(id) {
  MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN);
  MPI_Comm_rank(comm, &rank);
  MPI_Comm_size(comm, &size);
  check_mpi(MPI_Comm_split_type(comm, MPI_COMM_TYPE_SHARED, rank, MPI_INFO_NULL, &host_comm), "MPI_Comm_split_type");
  MPI_Comm_rank(host_comm, &local_rank);
  MPI_Comm_size(host_comm, &local_size);
}

ControlComm::Impl::~Impl() {
  int finalized = 0;
  MPI_Finalized(&finalized);
  if (finalized || std::uncaught_exceptions() > 0) return;  // MPI_Comm_free is collective
  const Operation operation(OperationKind::wait, "close group");
  MPI_Comm_free(&host_comm);
  MPI_Comm_free(&comm);
}

ControlComm ControlComm::world() {
  MPI_Comm comm = MPI_COMM_NULL;
  const Operation operation(OperationKind::control, "open world");
  check_mpi(MPI_Comm_dup(MPI_COMM_WORLD, &comm), "MPI_Comm_dup");
  return ControlComm(std::make_shared<const Impl>(comm, 1));
}

ControlComm ControlComm::split(int color, int key) const {
  MPI_Comm comm = MPI_COMM_NULL;
  const ControlOperation operation(*impl_, "split");
  check_mpi(MPI_Comm_split(impl_->comm, color, key, &comm), "MPI_Comm_split");
  return ControlComm(std::make_shared<const Impl>(comm, split_group_id(impl_->group_id, ++impl_->split_count, color)));
}

int ControlComm::rank() const { return impl_->rank; }
int ControlComm::size() const { return impl_->size; }
int ControlComm::local_rank() const { return impl_->local_rank; }
int ControlComm::local_size() const { return impl_->local_size; }

std::string ControlComm::broadcast(const std::string& text, int root) const {
  const ControlOperation operation(*impl_, "broadcast", text.size());
  std::int64_t length = static_cast<std::int64_t>(text.size());
  check_mpi(MPI_Bcast(&length, 1, MPI_INT64_T, root, impl_->comm), "MPI_Bcast");
  std::string result = impl_->rank == root ? text : std::string(static_cast<std::size_t>(length), '\0');
  check_mpi(MPI_Bcast(result.data(), static_cast<int>(length), MPI_CHAR, root, impl_->comm), "MPI_Bcast");
  return result;
}

std::vector<std::string> ControlComm::gather(const std::string& text) const {
  const ControlOperation operation(*impl_, "gather", text.size());
  const int length = static_cast<int>(text.size());
  std::vector<int> lengths(impl_->size), offsets(impl_->size);
  check_mpi(MPI_Gather(&length, 1, MPI_INT, lengths.data(), 1, MPI_INT, 0, impl_->comm), "MPI_Gather");
  std::exclusive_scan(lengths.begin(), lengths.end(), offsets.begin(), 0);
  std::string all(impl_->rank == 0 ? static_cast<std::size_t>(offsets.back() + lengths.back()) : 0, '\0');
  check_mpi(
      MPI_Gatherv(text.data(), length, MPI_CHAR, all.data(), lengths.data(), offsets.data(), MPI_CHAR, 0, impl_->comm),
      "MPI_Gatherv");
  std::vector<std::string> texts;
  if (impl_->rank != 0) return texts;
  for (int r = 0; r < impl_->size; ++r) texts.push_back(all.substr(offsets[r], lengths[r]));
  return texts;
}

namespace {

template <class T>
std::vector<T> gather_equal_sizes(const ControlComm::Impl& group, const std::vector<T>& values, MPI_Datatype type) {
  const ControlOperation operation(group, "gather", values.size() * sizeof(T));
  std::vector<T> all(group.rank == 0 ? values.size() * group.size : 0);
  check_mpi(MPI_Gather(values.data(), static_cast<int>(values.size()), type, all.data(),
                       static_cast<int>(values.size()), type, 0, group.comm),
            "MPI_Gather");
  return all;
}

template <class T>
T all_reduce_max(const ControlComm::Impl& group, T value, MPI_Datatype type) {
  const ControlOperation operation(group, "max", sizeof(T));
  check_mpi(MPI_Allreduce(MPI_IN_PLACE, &value, 1, type, MPI_MAX, group.comm), "MPI_Allreduce");
  return value;
}

}  // namespace

std::vector<double> ControlComm::gather(const std::vector<double>& values) const {
  return gather_equal_sizes(*impl_, values, MPI_DOUBLE);
}

std::vector<std::int64_t> ControlComm::gather(const std::vector<std::int64_t>& values) const {
  return gather_equal_sizes(*impl_, values, MPI_INT64_T);
}

void ControlComm::sum(std::vector<float>& values) const {
  const ControlOperation operation(*impl_, "sum", values.size() * sizeof(float));
  constexpr std::size_t chunk = std::size_t{1} << 28;  // floats: MPI counts are int
  for (std::size_t offset = 0; offset < values.size(); offset += chunk) {
    const int count = static_cast<int>(std::min(chunk, values.size() - offset));
    const void* send = impl_->rank == 0 ? MPI_IN_PLACE : static_cast<const void*>(values.data() + offset);
    check_mpi(MPI_Reduce(send, values.data() + offset, count, MPI_FLOAT, MPI_SUM, 0, impl_->comm), "MPI_Reduce");
  }
}

double ControlComm::max(double value) const { return all_reduce_max(*impl_, value, MPI_DOUBLE); }
std::int64_t ControlComm::max(std::int64_t value) const { return all_reduce_max(*impl_, value, MPI_INT64_T); }
void ControlComm::barrier() const {
  const ControlOperation operation(*impl_, "barrier");
  check_mpi(MPI_Barrier(impl_->comm), "MPI_Barrier");
}

void ControlComm::agree(ExitCode code, const std::string& message) const {
  const int worst = static_cast<int>(max(std::int64_t{static_cast<int>(code)}));
  if (worst == 0) return;
  const std::int64_t first_failed =
      impl_->size - max(message.empty() ? std::int64_t{0} : std::int64_t{impl_->size - impl_->rank});
  throw AgreedError(broadcast(message, static_cast<int>(first_failed)), static_cast<ExitCode>(worst));
}

}  // namespace nsa
