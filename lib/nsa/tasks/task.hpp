#pragma once
// The two kinds of measured points, and what they have in common.

#include <string>

#include "comm/agreement.hpp"
#include "kernels/interface/buffer.hpp"
#include "nsa/config/config.hpp"
#include "nsa/model/model_shard.hpp"
#include "nsa/results/records.hpp"
#include "nsa/tasks/measure.hpp"
#include "nsa/tasks/session.hpp"
#include "nsa/verify/float64_check.hpp"
#include "nsa/verify/tensor_dump.hpp"

namespace nsa {

/// Any rank's problem ("" = none) makes the point INVALID. Collective.
void fail_where(const ControlComm& world, const std::string& problem, PointRecord& record);

/// After the recorded pass: what the checks found, and where tensors are wanted those of all ranks. Collective.
void keep_records(const ControlComm& world, ModelShard& engine, const TensorSource& source, const CheckResult& checked,
                  StepTensors* tensors, std::int64_t positions, PointRecord& record);

/// After the measurement: samples of all ranks, routes and what fell back. Collective.
void finish_point(const ControlComm& world, ModelShard& engine, const Samples& samples, PointRecord& record);

/// Both fill the record (rank 0: whole) and return the memory this rank used. Collective.
MemoryAccount run_decode(const Session& session, const Config& config, const Point& point, const TensorSource& source,
                         PointRecord& record, const Progress& progress);
MemoryAccount run_prefill(const Session& session, const Config& config, const Point& point, const TensorSource& source,
                          PointRecord& record, const Progress& progress);

}  // namespace nsa
