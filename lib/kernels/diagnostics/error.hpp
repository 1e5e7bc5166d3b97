#pragma once
// The three ways this library fails. Library code throws; only main prints and exits.
//
// Message grammar: "<what is wrong> (<why>); <what to do>".

#include <stdexcept>
#include <string>

namespace nsa {

/// Process exit codes, agreed by all ranks (the largest wins).
enum class ExitCode : int {
  ok = 0,
  usage = 2,           ///< command line or input file
  invalid_result = 3,  ///< the run finished and its result is wrong, or --strict saw a fallback
  communication = 4,   ///< a collective or a peer timed out
  device = 5,          ///< device or memory
  file = 6,            ///< result or tensor file
  interrupted = 75,    ///< stopped on request, resumable
};

/// Something the user can mend.
class UserError : public std::runtime_error {
 public:
  explicit UserError(const std::string& message, ExitCode code = ExitCode::usage)
      : std::runtime_error(message), code_(code) {}
  ExitCode code() const noexcept { return code_; }

 private:
  ExitCode code_;
};

/// A kernel that the device refused to start and that left the device usable: another may do the work.
class LaunchError : public UserError {
 public:
  explicit LaunchError(const std::string& message) : UserError(message, ExitCode::device) {}
};

/// A UserError that every rank of the launch throws alike: one of them says it and all end in order.
class AgreedError : public UserError {
 public:
  using UserError::UserError;
};

/// A broken invariant of ours: a bug.
class InternalError : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

}  // namespace nsa
