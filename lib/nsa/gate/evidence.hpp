#pragma once
// The files a gate is given, sorted into devices; what may not be mixed is refused.

#include <string>
#include <vector>

#include "nsa/gate/gate.hpp"

namespace nsa {

struct DevicePoints {
  std::string device, backend, git_commit, precision, measured;
  std::vector<std::string> files, commands;
  std::vector<const PointRecord*> dense;            ///< kernels of the other branches
  std::vector<const PointRecord*> decode, kernels;  ///< valid ones, kernels of the selected branch
  std::vector<std::string> invalid_shapes;          ///< kernel points that are INVALID
  std::vector<std::string> notes;
};

std::vector<DevicePoints> sort_files(const std::vector<GateFile>& files);

/// "N=256 H=4 D=64 n=8 scattered"
std::string shape_name(const PointRecord& kernels_point);

}  // namespace nsa
