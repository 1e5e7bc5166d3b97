#pragma once
// The kinds of measured points, decode, prefill and mixed, and what they share.

#include <string>

#include "comm/agreement.hpp"
#include "kernels/interface/buffer.hpp"
#include "nsa/config/config.hpp"
#include "nsa/model/model_shard.hpp"
#include "nsa/results/records.hpp"
#include "nsa/tasks/measure.hpp"
#include "nsa/tasks/session.hpp"
#include "nsa/verify/float64_check.hpp"
#include "nsa/verify/read_counts.hpp"
#include "nsa/verify/shared_blocks.hpp"
#include "nsa/verify/tensor_dump.hpp"

namespace nsa {

/// Any rank's problem ("" = none) makes the point INVALID. Collective.
void gather_problems(const ControlComm& world, const std::string& problem, PointRecord& record);

/// Writes the first `positions` positions to the caches, by a prefill or with synthetic rows (run.fill), and connects
/// the shard. Collective.
void fill_caches(const Session& session, ModelShard& shard, const TensorSource& source, std::int64_t positions,
                 const Progress& progress);

/// After the recorded pass: stores what the checks found and the tensors that are asked for, those of all ranks.
/// Returns the largest |v| that the checks of any rank saw. Collective.
double keep_records(const ControlComm& world, ModelShard& shard, const TensorSource& source, const CheckResult& checked,
                    StepTensors* tensors, const std::vector<std::int64_t>& ends, PointRecord& record);

/// After the recorded pass: stores what neighbouring queries share, over all ranks. Collective.
void record_shared(const ControlComm& world, const SharedBlocks& shared, PointRecord& record);

/// After a measured pass: stores the reads of all ranks and checks them, and their sums against `totals`
/// [branch][step], on rank 0. Collective.
void record_reads(const ControlComm& world, const RankReads& reads, const std::vector<std::int64_t>& totals,
                  PointRecord& record);

/// After the measurement: the routes of a phase, on which all ranks agree. Collective.
RouteRecord agreed_routes(const ControlComm& world, ModelShard& shard, Phase phase);

/// After the measurement: stores samples of all ranks, routes and fallbacks. Collective.
void finish_point(const ControlComm& world, ModelShard& shard, const Samples& samples, PointRecord& record);

/// All fill the record, on rank 0 with the values of all ranks, and return the memory this rank used. Collective.
MemoryAccount run_decode(const Session& session, const Config& config, const Point& point, const TensorSource& source,
                         PointRecord& record, const Progress& progress);
MemoryAccount run_prefill(const Session& session, const Config& config, const Point& point, const TensorSource& source,
                          PointRecord& record, const Progress& progress);
MemoryAccount run_mixed(const Session& session, const Config& config, const Point& point, const TensorSource& source,
                        PointRecord& record, const Progress& progress);

}  // namespace nsa
