#pragma once
// Sorts the result files of a gate by device. Files that must not be mixed are an error.

#include <string>
#include <vector>

#include "nsa/gate/gate.hpp"

namespace nsa {

/// A point that the input of a file asks for and that no file measured whole.
struct Gap {
  std::string what;  ///< "N=256 H=4 D=64 n=8 scattered", "context 2048"; "points of k.h5" where its input is not known
  std::string why;   ///< "not in k.h5 (status interrupted), whose input asks for it; ..."
  std::int64_t context = 0, batch = 1;  ///< of a decode point; context 0: not known
};

/// The same shape, measured by another program on the same device.
struct PeerPoint {
  const PointRecord* point;
  const GateFile* file;
};

struct KernelEvidence {
  const PointRecord* point;
  const GateFile* file;
  std::vector<PeerPoint> peers;
};

struct DevicePoints {
  std::string device, backend, git_commit, precision, measured;
  std::vector<std::string> files, commands;
  std::vector<const PointRecord*> dense;   ///< kernel points of cmp and win
  std::vector<const PointRecord*> decode;  ///< valid and whole
  std::vector<KernelEvidence> kernels;     ///< of sel, valid and whole
  std::vector<Gap> decode_gaps, kernel_gaps, peer_gaps;
  std::vector<std::string> peers;  ///< "torch 2.11.0, cuDNN 9.13.0 (peers.h5)", one a file
  std::vector<std::string> notes;
};

/// Name of the device of a file's ranks. Throws UserError where they differ.
std::string device_of(const GateFile& file);

/// One entry a device, by backend and name. The order of `files` changes nothing.
std::vector<DevicePoints> sort_files(const std::vector<GateFile>& files);

/// "N=256 H=4 D=64 n=8 scattered"
std::string shape_name(const PointRecord& kernels_point);

}  // namespace nsa
