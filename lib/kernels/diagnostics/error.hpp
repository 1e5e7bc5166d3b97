#pragma once
// Exceptions and exit codes. Library code throws; only main prints and exits.
//
// Message grammar: "<what is wrong> (<why>); <what to do>".

#include <stdexcept>
#include <string>

namespace nsa {

/// Process exit codes. All ranks agree on one: the largest.
enum class ExitCode : int {
  ok = 0,
  usage = 2,           ///< command line or input file
  invalid_result = 3,  ///< the run finished and its result is wrong, or --strict and a fallback ran
  communication = 4,   ///< a collective or a peer timed out
  device = 5,          ///< device or memory
  file = 6,            ///< result or tensor file
  interrupted = 75,    ///< stopped on request, resumable
};

/// An error that the user can fix.
class UserError : public std::runtime_error {
 public:
  explicit UserError(const std::string& message, ExitCode code = ExitCode::usage)
      : std::runtime_error(message), code_(code) {}
  ExitCode code() const noexcept { return code_; }

 private:
  ExitCode code_;
};

/// A kernel launch that the device refused. The device stays usable: another kernel may run in its place.
class LaunchError : public UserError {
 public:
  explicit LaunchError(const std::string& message) : UserError(message, ExitCode::device) {}
};

/// A UserError that every rank throws with the same message: one rank prints it and all exit in order.
class AgreedError : public UserError {
 public:
  using UserError::UserError;
};

/// A broken invariant of the program: a bug.
class InternalError : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

}  // namespace nsa
