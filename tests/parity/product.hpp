#pragma once
// Runs the program in process on a shape of the tests and passes its tensors to the oracle.

#include <cstdint>
#include <string>
#include <vector>

#include "comm/session.hpp"
#include "nsa/config/config.hpp"
#include "nsa/experiment/experiment.hpp"
#include "nsa/results/records.hpp"
#include "oracle/oracle.hpp"
#include "parity/compare.hpp"

namespace parity {

/// A case: decode of `steps` tokens after `context`, or prefill of both together.
struct Shape {
  std::string name;
  std::int64_t context = 0, steps = 0;
  std::vector<std::string> overrides;  ///< "section.key=value" on top of a small fp32 model; with batch.context,
                                       ///< `context` is not used
};

/// Overrides: K and V of sel and win, and of cmp, stored as FP8.
inline constexpr const char *fp8_kv = "model.kv_precision=\"fp8_e4m3\"", *fp8_cmp = "model.cmp_precision=\"fp8_e4m3\"";

/// Decode of the shape's steps, or prefill of context + steps tokens: the same tokens either way.
nsa::Config config_of(const Shape& shape, nsa::TaskKind kind);

/// Prefill of the shape's steps onto a prefix of its context, in chunks of `chunk` tokens (0: at once): the last rows
/// of the other prefill.
nsa::Config prefix_config_of(const Shape& shape, std::int64_t chunk = 0);

/// A session that copies little to measure the copy bandwidth: at full size that takes longer than all else in a point.
nsa::Session open_test_session(const nsa::Config& config, const nsa::ControlComm& group);
/// Runs the one point of a config over the session's ranks. The record is complete on its rank 0.
nsa::PointRecord run(const nsa::Config& config, const nsa::Session& session);
/// The same in a session of its own over the ranks of `group`.
nsa::PointRecord run(const nsa::Config& config, const nsa::ControlComm& group);

/// The positions of the first recorded rows.
FirstPositions first_of(const nsa::PointRecord& record);

bool has(const nsa::PointRecord& record, const std::string& name);
/// Throw std::runtime_error when the record has no such tensor.
oracle::Reals reals(const nsa::PointRecord& record, const std::string& name);
oracle::Integers integers(const nsa::PointRecord& record, const std::string& name);

oracle::Options options_of(const nsa::Config& config);
std::vector<oracle::Weights> weights_of(const nsa::Config& config, const nsa::PointRecord& record);
/// scope = "attention": the given q, k, v and gates of all positions.
oracle::Projected given_of(const nsa::Config& config, const nsa::PointRecord& record);

/// Tokens counted by all ranks together at a step.
std::int64_t counted_reads(const nsa::PointRecord& record, int branch, std::int64_t step);
/// Whether every rank counted at every step what the shape predicts.
bool reads_as_expected(const nsa::PointRecord& record);

}  // namespace parity
