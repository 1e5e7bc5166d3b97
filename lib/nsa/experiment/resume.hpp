#pragma once
// Resuming a run from its result file.

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "nsa/results/result_file.hpp"

namespace nsa {

/// Whether a key of the input decides what a point holds. The others name files, or the result file records their
/// effect: backend, shards, content of the input file.
bool decides_point(const std::string& key);

/// Throws UserError(usage) unless this run equals the one that began the file; the message names every difference:
/// effective input, program, ranks and shards, and on any rank processor, threads of the host backend, GPU and library
/// versions. Hosts may differ. `shards`: heads and kv of this run.
void check_same_run(const std::string& path, const ResultFile& before, const RunRecord& now,
                    std::pair<std::int64_t, std::int64_t> shards);

/// The finished points of the file, which are kept; fingerprints[i] is that of point i in this run. An interrupted
/// point is left out. Throws UserError(usage) where a fingerprint differs.
std::vector<PointRecord> finished_points(const std::string& path, ResultFile before,
                                         const std::vector<std::string>& fingerprints);

/// The run record after a resume: it keeps uuid, start and input of the first run; a rank's host lists all its hosts.
RunRecord resumed_record(const RunRecord& before, RunRecord now);

}  // namespace nsa
