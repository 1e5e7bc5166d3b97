#pragma once
// Sorts the result files of a gate by device. Files that must not be mixed are an error.

#include <string>
#include <vector>

#include "nsa/gate/gate.hpp"

namespace nsa {

struct DevicePoints {
  std::string device, backend, git_commit, precision, measured;
  std::vector<std::string> files, commands;
  std::vector<const PointRecord*> dense;            ///< kernel points of cmp and win
  std::vector<const PointRecord*> decode, kernels;  ///< valid decode points; valid kernel points of sel
  std::vector<std::string> invalid_shapes;          ///< shapes of INVALID kernel points of sel
  std::vector<std::string> notes;
};

std::vector<DevicePoints> sort_files(const std::vector<GateFile>& files);

/// "N=256 H=4 D=64 n=8 scattered"
std::string shape_name(const PointRecord& kernels_point);

}  // namespace nsa
