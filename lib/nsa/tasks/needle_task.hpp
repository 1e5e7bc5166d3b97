#pragma once
// kind = "needle": a key planted at several depths of a long context has to be found by the real pipeline.

#include "kernels/interface/buffer.hpp"
#include "nsa/config/config.hpp"
#include "nsa/results/records.hpp"
#include "nsa/tasks/session.hpp"

namespace nsa {

/// A needle run as the decode step that it is: scope = attention, the last position of the context asks.
Config needle_config(const Config& config);
Point needle_point(const Point& point);

/// For each depth: plants in every group a key that points along the queries of the last position, compresses,
/// decodes one step, and looks whether its block was chosen and o_sel is the planted value. Fills record.needle and
/// record.valid; returns the memory this rank used.
/// Collective.
MemoryAccount run_needles(const Session& session, const Config& config, const Point& point, PointRecord& record,
                          const Progress& progress);

}  // namespace nsa
