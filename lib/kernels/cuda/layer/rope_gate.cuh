#pragma once
// RoPE, rounding and the gate: what project does after its product. One CTA a (row, group). Bound: the latency of its
// loads, so each thread has all of them in flight together, and loads the gate's weights before the predecessor ends.

#include <algorithm>

#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

// kv_column_order for device code, which cannot index the array.
__device__ inline Branch branch_in_column(int order) { return order == 0 ? sel : order == 1 ? cmp : win; }
static_assert(kv_column_order[0] == sel && kv_column_order[1] == cmp && kv_column_order[2] == win);

// First column of K of a branch in the product; its V follows.
__device__ inline std::int64_t kv_column(const LayerShape& s, int order) {
  return std::int64_t{s.heads()} * s.d_k + std::int64_t{order} * s.groups * (s.d_k + s.d_v);
}

/// Shared memory of a CTA, in floats after the (cos, sin) of every pair of columns.
struct GateMemory {
  float2* cos_sin;  ///< [Dk/2]
  float* mean;      ///< [Dk]: the rotated q, over the heads of the group
  float* hidden;    ///< [Dk/2]: hidden layer of the gate
  float* w2;        ///< [Dk/2, 3]
  float* slices;    ///< [max(Dk, 2 * threads)]: sums of some of the threads
  __device__ GateMemory(float2* memory, int d_k)
      : cos_sin(memory),
        mean(reinterpret_cast<float*>(memory + d_k / 2)),
        hidden(mean + d_k),
        w2(hidden + d_k / 2),
        slices(w2 + d_k / 2 * branches) {}
};
inline std::size_t gate_shared(const LayerShape& s, int threads) {
  const int half = s.d_k / 2;
  return static_cast<std::size_t>(2 * half + s.d_k + half + half * branches + std::max(s.d_k, 2 * threads)) *
         sizeof(float);
}

/// The gate of a (row, group), by Threads threads: softmax or sigmoid of SiLU(mean W1 + b1) W2 + b2. The weights of the
/// first round are loaded before the predecessor completes.
template <int Threads>
class Gate {
 public:
  __device__ Gate(const ProjectArgs& a, const GateMemory& memory)
      : a_(a),
        memory_(memory),
        half_(a.shape.d_k / 2),
        units_(min(half_, Threads)),
        split_(Threads / units_),
        unit_(threadIdx.x % units_),
        slice_(threadIdx.x / units_) {
    if (a.force_branch >= 0) return;
#pragma unroll
    for (int i = 0; i < ahead; ++i) w1_[i] = has_term(i) ? weight(i, unit_) : 0.0f;
    b1_ = a.weights.gate_b1[unit_];
    for (int i = threadIdx.x; i < half_ * branches; i += Threads) memory.w2[i] = a.weights.gate_w2[i];
    if (threadIdx.x == 0)
#pragma unroll
      for (int b = 0; b < branches; ++b) b2_[b] = a.weights.gate_b2[b];
  }
  /// Once the mean is there. All Threads.
  __device__ void write(float* gate) const {
    hidden_layer();
    if (threadIdx.x >= 32) return;
    float logits[branches];
#pragma unroll
    for (int b = 0; b < branches; ++b) {
      float sum = 0.0f;
#pragma unroll 2
      for (int j = threadIdx.x; j < half_; j += 32) sum += memory_.hidden[j] * memory_.w2[j * branches + b];
      logits[b] = warp_sum(sum) + b2_[b];
    }
    if (threadIdx.x == 0) store_gate(gate, logits);
  }

 private:
  static constexpr int ahead = 32;
  // Term i of this thread: column slice + i * split of the mean.
  __device__ bool has_term(int i) const { return slice_ < split_ && slice_ + i * split_ < a_.shape.d_k; }
  __device__ float weight(int i, int unit) const { return a_.weights.gate_w1[(slice_ + i * split_) * half_ + unit]; }
  // In rounds of `units_` units; the terms of a unit are split over the threads.
  __device__ void hidden_layer() const {
#pragma unroll 1
    for (int j0 = 0; j0 < half_; j0 += units_) {
      const int j = j0 + unit_;
      float sum = 0.0f;
      if (j < half_) {
        if (j0 == 0) {
#pragma unroll
          for (int i = 0; i < ahead; ++i)
            if (has_term(i)) sum += memory_.mean[slice_ + i * split_] * w1_[i];
        }
#pragma unroll 8
        for (int i = j0 == 0 ? ahead : 0; has_term(i); ++i) sum += memory_.mean[slice_ + i * split_] * weight(i, j);
      }
      memory_.slices[threadIdx.x] = sum;
      __syncthreads();
      if (slice_ == 0 && j < half_) {
        sum = j0 == 0 ? b1_ : a_.weights.gate_b1[j];
#pragma unroll 4
        for (int i = 0; i < split_; ++i) sum += memory_.slices[i * units_ + unit_];
        memory_.hidden[j] = sum / (1.0f + expf(-sum));
      }
      __syncthreads();
    }
  }
  __device__ void store_gate(float* gate, float (&logits)[branches]) const {
    if (a_.shape.gate == GateKind::sigmoid) {
      for (int b = 0; b < branches; ++b) gate[b] = 1.0f / (1.0f + expf(-logits[b]));
      return;
    }
    const float max_logit = fmaxf(fmaxf(logits[0], logits[1]), logits[2]);
    float total = 0.0f;
    for (int b = 0; b < branches; ++b) total += logits[b] = expf(logits[b] - max_logit);
    for (int b = 0; b < branches; ++b) gate[b] = logits[b] / total;
  }

  const ProjectArgs& a_;
  const GateMemory& memory_;
  const int half_, units_, split_, unit_, slice_;
  float w1_[ahead], b1_, b2_[branches];
};

/// Row (r, g) of the product to q, k and v. Every load of a thread is under way before the first store.
template <class T, int Threads>
struct RotateRow {
  const ProjectArgs& a;
  const float* from;  ///< row of the product
  std::int64_t row;
  int g;

  __device__ int kv_branches() const { return a.shape.shared_kv ? 1 : branches; }
  // Column of rotated row j in the product: query head j of the group, then K of each branch.
  __device__ int column(int j) const {
    const LayerShape& s = a.shape;
    const int h = s.heads_per_group;
    return j < h ? (g * h + j) * s.d_k : static_cast<int>(kv_column(s, j - h)) + g * s.d_k;
  }
  __device__ T* target(int j) const {
    const LayerShape& s = a.shape;
    const int h = s.heads_per_group;
    if (j < h) return static_cast<T*>(a.q) + row * s.heads() * s.d_k + (g * h + j) * s.d_k;
    return static_cast<T*>(a.k[branch_in_column(j - h)]) + (row * s.groups + g) * s.d_k;
  }
  __device__ const float* value_source(int item) const {
    const LayerShape& s = a.shape;
    return from + static_cast<int>(kv_column(s, item / s.d_v)) + s.groups * s.d_k + g * s.d_v + item % s.d_v;
  }
  __device__ T* value_target(int item) const {
    const LayerShape& s = a.shape;
    return static_cast<T*>(a.v[branch_in_column(item / s.d_v)]) + (row * s.groups + g) * s.d_v + item % s.d_v;
  }

  // Also the mean of the rotated and rounded q.
  __device__ void run(const GateMemory& memory) const {
    constexpr int at_once = 2;
    const int values = kv_branches() * a.shape.d_v;
    float value[at_once];
#pragma unroll
    for (int i = 0; i < at_once; ++i) {
      const int item = i * Threads + threadIdx.x;
      if (item < values) value[i] = *value_source(item);
    }
    rotate(memory);
#pragma unroll
    for (int i = 0; i < at_once; ++i) {
      const int item = i * Threads + threadIdx.x;
      if (item < values) store(value_target(item), value[i]);
    }
#pragma unroll 1
    for (int item = at_once * Threads + threadIdx.x; item < values; item += Threads)
      store(value_target(item), *value_source(item));
    __syncthreads();
    average(memory);
    __syncthreads();
  }
  __device__ int pairs() const { return min(a.shape.d_k / 2, Threads); }
  __device__ void rotate(const GateMemory& memory) const {
    constexpr int at_once = 5;  // 16 heads and K of three branches by 4 threads a pair
    const int half = a.shape.d_k / 2, h = a.shape.heads_per_group, rows = h + kv_branches(), slices = Threads / pairs(),
              slice = threadIdx.x / pairs();
    if (slice >= slices) return;
#pragma unroll 1
    for (int pair = threadIdx.x % pairs(); pair < half; pair += pairs()) {
      const float2 cs = memory.cos_sin[pair];
      float2 sum = {};
#pragma unroll 1
      for (int j0 = slice; j0 < rows; j0 += slices * at_once) {
        float2 x[at_once];
#pragma unroll
        for (int i = 0; i < at_once; ++i) {
          const int j = j0 + i * slices;
          if (j < rows) {
            const float* at = from + column(j) + 2 * pair;
            x[i] = make_float2(at[0], at[1]);
          }
        }
#pragma unroll
        for (int i = 0; i < at_once; ++i) {
          const int j = j0 + i * slices;
          if (j >= rows) continue;
          T* to = target(j) + 2 * pair;
          T even, odd;
          store(&even, x[i].x * cs.x - x[i].y * cs.y);
          store(&odd, x[i].x * cs.y + x[i].y * cs.x);
          to[0] = even, to[1] = odd;
          if (j < h) sum.x += to_float(even), sum.y += to_float(odd);
        }
      }
      memory.slices[slice * a.shape.d_k + 2 * pair] = sum.x;
      memory.slices[slice * a.shape.d_k + 2 * pair + 1] = sum.y;
    }
  }
  __device__ void average(const GateMemory& memory) const {
#pragma unroll 1
    for (int e = threadIdx.x; e < a.shape.d_k; e += Threads) {
      float sum = 0.0f;
#pragma unroll 4
      for (int slice = 0; slice < Threads / pairs(); ++slice) sum += memory.slices[slice * a.shape.d_k + e];
      memory.mean[e] = sum / a.shape.heads_per_group;
    }
  }
};

/// Work item (row, group) of the product to q, k, v and gate, by a CTA, with griddep_wait() inside. Shared memory:
/// gate_shared().
template <class T, int Threads>
__device__ void rope_and_gate(const ProjectArgs& a, const float* product, std::int64_t columns, std::int64_t work_item,
                              float2* shared) {
  const LayerShape& s = a.shape;
  const GateMemory memory(shared, s.d_k);
  const std::int64_t row = work_item / s.groups;
  const int g = static_cast<int>(work_item % s.groups), half = s.d_k / 2;
  const Gate<Threads> gate(a, memory);
  // The position was set before the predecessor began, so the angles do not wait for it. In half turns, whose integer
  // part is exact to leave out.
  const double t = static_cast<double>(__ldcg(a.tile.first_position + row / a.tile.tokens * a.tile.position_stride) +
                                       row % a.tile.tokens);
  constexpr double inverse_pi = 0.31830988618379067154;
  for (int i = threadIdx.x; i < half; i += Threads) {
    double sine, cosine;
    sincospi(t * exp2(-2.0 * i / s.d_k * log2(s.rope_base)) * inverse_pi, &sine, &cosine);
    memory.cos_sin[i] = make_float2(static_cast<float>(cosine), static_cast<float>(sine));
  }
  griddep_wait();
  __syncthreads();
  RotateRow<T, Threads>{a, product + row * columns, row, g}.run(memory);
  float* to = a.gate + (row * s.groups + g) * branches;
  if (a.force_branch < 0)
    gate.write(to);
  else if (threadIdx.x < branches)
    to[threadIdx.x] = static_cast<int>(threadIdx.x) == a.force_branch ? 1.0f : 0.0f;
}

}  // namespace nsa::gpu
