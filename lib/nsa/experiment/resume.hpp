#pragma once
// Taking up a result file where an earlier run left it.

#include <string>
#include <vector>

#include "nsa/model/partition.hpp"
#include "nsa/results/result_file.hpp"

namespace nsa {

/// Whether a key of the input decides what a point holds. The others name files, or the file says what they led to:
/// backend, shards, what the input file holds.
bool decides_point(const std::string& key);

/// Throws UserError(usage) that names everything in which this run would not be the one that began the file: effective
/// input, program, ranks and shards, and on any rank processor, GPU and library versions. Hosts may differ.
void check_same_run(const std::string& path, const ResultFile& before, const RunRecord& now, const Partition& shards);

/// The finished points of the file, which stay; fingerprints[i] is that of point i now. One that was cut short is not
/// among them. Throws UserError(usage) where a fingerprint differs.
std::vector<PointRecord> finished_points(const std::string& path, ResultFile before,
                                         const std::vector<std::string>& fingerprints);

/// What the file says of the run from now on: it keeps its name, start and input; a rank's host lists all it ran on.
RunRecord continued(const RunRecord& before, RunRecord now);

}  // namespace nsa
