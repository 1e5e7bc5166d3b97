#pragma once
// The MPI session and control messages between ranks: configuration, agreement on errors, gathering of results.
// Communicator carries the data of the kernels. No MPI type is visible outside this folder.

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels/diagnostics/error.hpp"

namespace nsa {

/// Initialises MPI and finalises it. It does not finalise while an exception unwinds: the ranks may then disagree and
/// MPI_Finalize would hang; the handler prints its message and calls abort().
class MpiSession {
 public:
  MpiSession(int& argc, char**& argv);
  ~MpiSession();
  MpiSession(const MpiSession&) = delete;
  MpiSession& operator=(const MpiSession&) = delete;
  [[noreturn]] static void abort(ExitCode code);
  static std::string library_version();
};

/// A group of ranks and its control messages, outside of the timed work. Every call is collective but the getters.
class ControlComm {
 public:
  ControlComm() = default;  ///< no group; for planning without MPI
  static ControlComm world();
  ControlComm split(int color, int key) const;
  int rank() const;
  int size() const;
  int local_rank() const;  ///< among the ranks of this host
  int local_size() const;
  std::string broadcast(const std::string& text, int root = 0) const;   ///< root's text
  std::vector<std::string> gather(const std::string& text) const;       ///< by rank on rank 0, else empty
  std::vector<double> gather(const std::vector<double>& values) const;  ///< equal sizes; by rank on rank 0, else empty
  std::vector<std::int64_t> gather(const std::vector<std::int64_t>& values) const;
  void sum(std::vector<float>& values) const;  ///< elementwise over ranks; the result is on rank 0 only
  double max(double value) const;              ///< over ranks; the result is on every rank
  std::int64_t max(std::int64_t value) const;
  void barrier() const;
  /// Every rank passes its result (ok and "" when it succeeded). If any rank failed, throws AgreedError on every rank,
  /// with the largest code and the message of the first rank that has one.
  void agree(ExitCode code, const std::string& message) const;

  struct Impl;
  const Impl& impl() const { return *impl_; }

 private:
  explicit ControlComm(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}
  std::shared_ptr<const Impl> impl_;
};

}  // namespace nsa
