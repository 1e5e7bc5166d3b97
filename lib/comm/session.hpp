#pragma once
// MPI's lifetime and its control traffic: configuration, agreement on errors, gathering results. Bulk data
// between kernels goes through Communicator. No MPI type leaves this folder.

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels/diagnostics/error.hpp"

namespace nsa {

/// Initialises MPI and finalises it, except while an exception unwinds past it: then the ranks may disagree and
/// finalising would hang; the catcher prints its message and calls abort().
class MpiSession {
 public:
  MpiSession(int& argc, char**& argv);
  ~MpiSession();
  MpiSession(const MpiSession&) = delete;
  MpiSession& operator=(const MpiSession&) = delete;
  [[noreturn]] static void abort(ExitCode code);
  static std::string library_version();
};

/// A group of ranks and what they tell each other outside of the timed work. Every call is collective.
class ControlComm {
 public:
  ControlComm() = default;  ///< no group: for planning
  static ControlComm world();
  ControlComm split(int color, int key) const;
  int rank() const;
  int size() const;
  int local_rank() const;  ///< among the ranks of this host
  int local_size() const;
  std::string broadcast(const std::string& text, int root = 0) const;   ///< root's text
  std::vector<std::string> gather(const std::string& text) const;       ///< by rank; empty but on rank 0
  std::vector<double> gather(const std::vector<double>& values) const;  ///< equal lengths, by rank; empty but on rank 0
  std::vector<std::int64_t> gather(const std::vector<std::int64_t>& values) const;
  void sum(std::vector<float>& values) const;  ///< elementwise over ranks, the result on rank 0
  double max(double value) const;              ///< on every rank
  std::int64_t max(std::int64_t value) const;
  void barrier() const;
  /// Every rank says how it fared (message "" = fine). When any failed, throws AgreedError on every rank, with the
  /// worst code and the message of the first rank that has one.
  void agree(ExitCode code, const std::string& message) const;

  struct Impl;
  const Impl& impl() const { return *impl_; }

 private:
  explicit ControlComm(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}
  std::shared_ptr<const Impl> impl_;
};

}  // namespace nsa
