#pragma once
// Attention of one case, stage by stage and fused, on the GPU and on the host, on the same random inputs and NaN-filled
// buffers.

#include <cstdint>
#include <memory>
#include <vector>

#include "catch.hpp"
#include "gpu/mirrored.hpp"

namespace nsa::test::attention {

struct Case {
  LayerShape shape;
  std::int32_t batch = 1, tokens = 1;  // rows of the tile: tokens consecutive positions of every sequence
  std::int64_t first = 0;
  std::int32_t kv = 1;
  std::int32_t chunk_blocks = 2;
  bool gathered = false;  // prefill: K/V of all ranks in one buffer
  bool ring = false;      // decode: the window in a ring
  bool scored = false;    // prefill: cmp stores raw scores, even where rank could recompute them
  float q_scale = 2.0f;   // of q's elements: sets the spread of the scores
  int left_out = -1;      // the branch that the fused step leaves out; the stages compute all three
  // Bytes of scratch that attend gets on the GPU.
  std::size_t max_scratch = SIZE_MAX;
  std::int64_t positions() const { return first + tokens; }
};

LayerShape shape_of(DType type, int groups, int h, int d_k, int d_v);

// The results of all ranks of a layout, on the GPU and on the host.
struct Run {
  /// `kernel`: index of the GPU's implementation, where that accepts the shape; else the first one runs.
  explicit Run(const Case& c, std::size_t kernel = 0);
  Case c;
  LayerShape s;
  std::int64_t rows, lists, blocks;
  std::vector<std::unique_ptr<MirroredBuffer>> partials, lse, p_slc, candidates, reads;
  std::unique_ptr<MirroredBuffer> selected, gate, o, o_branch;
  std::vector<std::int32_t> gpu_selected;
  // The results of the fused operation where it accepts the case, on the GPU only.
  bool fused = false;
  std::unique_ptr<MirroredBuffer> fused_selected, fused_o, fused_o_branch, fused_p_slc, fused_reads;
};

/// Compares the outputs, scores, choices and reads of the stages, and of the fused operation where it ran, with the
/// host's.
void check(const Run& run);
/// Every implementation of each branch on the GPU.
void run_and_check(const Case& c);

// What padded instances of the decode kernels serve: head sizes that are multiples of 16, several head tiles of a
// group, more than 16 selected blocks. Each case is compared with the host, fused with its stages, and sharded with
// whole sequences, whose blocks must be the same bit for bit.
void check_on_every_layout(Case c);

}  // namespace nsa::test::attention
