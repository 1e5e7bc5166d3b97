#pragma once
// kind = "needle": the pipeline must find a key that is planted at several depths of a long context.

#include "kernels/interface/buffer.hpp"
#include "nsa/config/config.hpp"
#include "nsa/results/records.hpp"
#include "nsa/tasks/session.hpp"

namespace nsa {

/// A needle run as a decode step: scope = attention, with the query at the last position of the context.
Config needle_config(const Config& config);
Point needle_point(const Point& point);

/// For each depth: plants in every group a key along the queries of the last position, compresses, decodes one step,
/// and checks that its block was chosen and that o_sel is the planted value. Fills record.needle and record.valid;
/// returns the memory this rank used. Collective.
MemoryAccount run_needles(const Session& session, const Config& config, const Point& point, PointRecord& record,
                          const Progress& progress);

}  // namespace nsa
