// Stages that move or fill cache rows: append, copy_rows, fill_rows, checksum; and the small vector kernels of a layer.
// Each element is streamed once; launches are grid-stride loops.

#include <algorithm>

#include "kernels/cuda/layer/append_compress.cuh"
#include "kernels/cuda/layer/fp8_rows.cuh"
#include "kernels/cuda/layer/stages.cuh"
#include "kernels/shared/checksum.hpp"
#include "kernels/shared/random.hpp"

namespace nsa::gpu {

namespace {

constexpr int threads = 256;

int blocks_for(std::int64_t items) {
  return static_cast<int>(std::clamp<std::int64_t>((items + threads - 1) / threads, 1, limits().sms * 16));
}

__device__ std::int64_t first_item() { return std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ std::int64_t item_step() { return std::int64_t{gridDim.x} * blockDim.x; }

template <class T>
__global__ void append_kernel(AppendArgs a) {
  griddep_wait();
  const std::int64_t k_items = a.tile.rows() * a.shape.groups * a.k_cache.width;
  const std::int64_t items = k_items + a.tile.rows() * a.shape.groups * a.v_cache.width;
  for (std::int64_t i = first_item(); i < items; i += item_step()) {
    if (i < k_items)
      append_element(a.tile, a.shape.groups, static_cast<const T*>(a.k), a.k_cache, i);
    else
      append_element(a.tile, a.shape.groups, static_cast<const T*>(a.v), a.v_cache, i - k_items);
  }
}

// `chunks` of the sequence from first_chunk on; the ones that dst does not hold are skipped.
// The view in vectors of so many elements, which its rows consist of.
KvView in_vectors(KvView view, int elements) {
  view.width /= elements;
  view.plane_stride /= elements;
  view.rank_stride /= elements;
  return view;
}

// Whether rows are whole aligned vectors of so many elements.
bool has_vectors(const KvView& view, int elements) {
  return view.width % elements == 0 && view.plane_stride % elements == 0 && view.rank_stride % elements == 0 &&
         reinterpret_cast<std::uintptr_t>(view.data) % sizeof(uint4) == 0;
}

template <class T>
__global__ void copy_rows_kernel(CopyRowsArgs a, std::int64_t first_chunk, std::int64_t chunks, std::int64_t span) {
  const int width = a.dst.width;
  const std::int64_t items = a.planes * chunks * span * width;
  for (std::int64_t item = first_item(); item < items; item += item_step()) {
    const std::int64_t e = item % width, k = item / width % span, rest = item / width / span;
    const std::int64_t c = first_chunk + rest % chunks, p = rest / chunks;
    if (a.dst.map.ring == 0 && !has_chunk(a.dst.map, c)) continue;
    const std::int64_t i = (c == 0 ? 0 : c * a.dst.map.chunk) + a.span_begin + k;
    if (i < a.first || i >= a.last || !has_row(a.src.map, i)) continue;
    if (!has_page(a.src, p, chunk_of(a.src.map, i), i) || !writes_row(a.dst, p, c, i)) continue;
    static_cast<T*>(a.dst.data)[offset_in_chunk(a.dst, p, c, i) + e] =
        static_cast<const T*>(a.src.data)[offset_of(a.src, p, i) + e];
  }
}

// Integer sums wrap and commute, so the order of the threads does not matter.
template <class Bits>
__global__ void checksum_kernel(ChecksumArgs a) {
  const int width = a.view.width;
  const std::int64_t rows = a.last - a.first, items = a.planes * rows * width;
  std::uint64_t sum = 0;
  for (std::int64_t item = first_item(); item < items; item += item_step()) {
    const std::int64_t e = item % width, i = a.first + item / width % rows, p = item / width / rows;
    if (!has_row(a.view.map, i)) continue;
    sum += checksum_term(static_cast<const Bits*>(a.view.data)[offset_of(a.view, p, i) + e],
                         static_cast<std::uint64_t>((p * a.last + i) * width + e));
  }
  atomicAdd(reinterpret_cast<unsigned long long*>(a.sum), static_cast<unsigned long long>(sum));
}

template <class T>
__global__ void fill_rows_kernel(FillRowsArgs a) {
  const RowMap& map = a.dst.map;
  const int width = a.dst.width;
  const std::int64_t rows = a.last - a.first, items = rows * a.batch * a.groups * width;
  const std::int64_t tail_rows = map.stride == INT64_MAX ? 0 : map.stride - map.halo - map.chunk;
  for (std::int64_t item = first_item(); item < items; item += item_step()) {
    const std::int64_t e = item % width, i = a.first + item / width % rows, p = item / width / rows;
    const std::int64_t b = p / a.groups, g = p % a.groups;
    const auto sequence = static_cast<std::uint32_t>(i < a.shared_rows ? 0 : a.batch_begin + b);
    T value;
    const std::uint64_t row = source_row(a.key, static_cast<std::uint64_t>(i), a.repeat);
    store(&value,
          a.scale * synthetic_value(a.key, sequence, row, static_cast<std::uint32_t>((a.group_begin + g) * width + e)));
    T* data = static_cast<T*>(a.dst.data);
    if (map.ring > 0) {
      if (i + map.ring >= a.last) data[offset_of(a.dst, p, i) + e] = value;
      continue;
    }
    const std::int64_t c = chunk_of(map, i), k = i - (c == 0 ? 0 : c * map.chunk);
    const auto write = [&](std::int64_t chunk) {
      if (writes_row(a.dst, p, chunk, i)) data[offset_in_chunk(a.dst, p, chunk, i) + e] = value;
    };
    if (has_chunk(map, c)) write(c);
    if (map.rank == all_ranks) continue;
    if (map.halo > 0 && k >= map.chunk - map.halo && has_chunk(map, c + 1)) write(c + 1);
    if (k < tail_rows && c > 0 && has_chunk(map, c - 1)) write(c - 1);
  }
}

__global__ void advance_kernel(AdvanceArgs a) {
  griddep_wait();
  const std::int64_t step = *a.step;
  __syncthreads();
  for (std::int64_t i = threadIdx.x; i < a.counters; i += blockDim.x) {
    if (a.reads_log && step < a.log_steps) a.reads_log[step * a.counters + i] = a.reads[i];
    a.reads[i] = 0;
  }
  if (a.selected && a.selected_log && step < a.log_steps)
    for (std::int64_t i = threadIdx.x; i < a.selected_count; i += blockDim.x)
      a.selected_log[step * a.selected_count + i] = a.selected[i];
  for (std::int64_t i = threadIdx.x; i < a.positions; i += blockDim.x)
    a.position[i] += kept_tokens(a.acceptance, step, i);
  if (threadIdx.x == 0) *a.step = step + 1;
}

template <class T>
__global__ void rmsnorm_kernel(int dim, const float* x, T* out, bool normalise) {
  griddep_wait();
  const std::int64_t r = blockIdx.x;
  __shared__ float sums[32];
  float factor = 1.0f;
  if (normalise) {
    float sum = 0;
    for (int e = threadIdx.x; e < dim; e += blockDim.x) sum += x[r * dim + e] * x[r * dim + e];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += sums[w];
    factor = 1.0f / sqrtf(sum / dim + 1e-6f);
  }
  for (int e = threadIdx.x; e < dim; e += blockDim.x) store(&out[r * dim + e], x[r * dim + e] * factor);
}

__global__ void add_kernel(std::int64_t count, float* x, const float* y) {
  griddep_wait();
  for (std::int64_t i = first_item(); i < count; i += item_step()) x[i] += y[i];
}

}  // namespace

void append(const AppendArgs& a, Stream* stream) {
  const std::int64_t items = a.tile.rows() * a.shape.groups * (a.k_cache.width + a.v_cache.width);
  if (items == 0) return;
  if (is_quantised(a.k_cache)) return append_quantised(a, stream);
  with_type(a.shape.dtype, [&](auto type) {
    launch_pdl(append_kernel<decltype(type)>, dim3(blocks_for(items)), threads, 0, stream, 1, a);
  });
  round_appended(a, stream);
}

void checksum(const ChecksumArgs& a, Stream* stream) {
  const std::int64_t items = a.planes * (a.last - a.first) * a.view.width;
  if (items <= 0) return;
  if (is_quantised(a.view)) {
    checksum_kernel<std::uint8_t><<<blocks_for(items), threads, 0, cuda(stream)>>>(a);
    return checksum_scales(a, stream);
  }
  if (a.dtype == DType::f32)
    checksum_kernel<std::uint32_t><<<blocks_for(items), threads, 0, cuda(stream)>>>(a);
  else
    checksum_kernel<std::uint16_t><<<blocks_for(items), threads, 0, cuda(stream)>>>(a);
  check_launch("checksum");
}

void copy_rows(const CopyRowsArgs& a, Stream* stream) {
  if (a.last <= a.first || a.planes == 0) return;
  const RowMap& map = a.dst.map;
  CopyRowsArgs args = a;
  if (map.ring > 0) args.first = std::max(a.first, a.last - map.ring);
  const bool whole = map.chunk == INT64_MAX;
  args.span_begin = std::max(a.span_begin, whole ? args.first : -std::int64_t{map.halo});
  const std::int64_t span = (whole ? std::min(a.span_end, a.last) : a.span_end) - args.span_begin;
  if (span <= 0) return;
  // The first chunk whose span ends after the first row; and one past the last row, whose halo may hold the last rows.
  const std::int64_t first_chunk = whole || a.first < a.span_end ? 0 : (a.first - a.span_end) / map.chunk + 1;
  const std::int64_t chunks = whole ? 1 : (a.last - 1) / map.chunk + 2 - first_chunk;
  if (is_quantised(a.src) || is_quantised(a.dst)) return copy_quantised_rows(args, first_chunk, chunks, span, stream);
  const auto run = [&](auto type) {
    copy_rows_kernel<decltype(type)>
        <<<blocks_for(a.planes * chunks * span * args.dst.width), threads, 0, cuda(stream)>>>(args, first_chunk, chunks,
                                                                                              span);
  };
  const int elements = static_cast<int>(sizeof(uint4) / size_of(a.dtype));
  if (has_vectors(a.src, elements) && has_vectors(a.dst, elements)) {
    args.src = in_vectors(a.src, elements), args.dst = in_vectors(a.dst, elements);
    run(uint4{});
  } else {
    with_type(a.dtype, run);
  }
  check_launch("copy_rows");
}

void fill_rows(const FillRowsArgs& a, Stream* stream) {
  const std::int64_t items = (a.last - a.first) * a.batch * a.groups * a.dst.width;
  if (items <= 0) return;
  if (is_quantised(a.dst)) return fill_quantised_rows(a, stream);
  with_type(a.dtype,
            [&](auto type) { fill_rows_kernel<decltype(type)><<<blocks_for(items), threads, 0, cuda(stream)>>>(a); });
  check_launch("fill_rows");
  round_rows(a.dtype, a.dst, std::int64_t{a.batch} * a.groups, a.first, a.last, stream);
}

void advance(const AdvanceArgs& a, Stream* stream) { launch_pdl(advance_kernel, dim3(1), threads, 0, stream, 1, a); }

void rmsnorm(const LayerShape& shape, std::int64_t rows, const float* x, void* out, bool normalise, Stream* stream) {
  if (rows == 0) return;
  with_type(shape.dtype, [&](auto type) {
    using T = decltype(type);
    launch_pdl(rmsnorm_kernel<T>, dim3(static_cast<unsigned>(rows)), threads, 0, stream, 1, shape.dim, x,
               static_cast<T*>(out), normalise);
  });
}

void add(std::int64_t count, float* x, const float* y, Stream* stream) {
  if (count == 0) return;
  launch_pdl(add_kernel, dim3(blocks_for(count)), threads, 0, stream, 1, count, x, y);
}

}  // namespace nsa::gpu
