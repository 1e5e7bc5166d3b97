#pragma once
// How the instances of the fused decode kernel are counted and launched (decode/fused/launch.cu chooses which).

#include "kernels/cuda/decode/fused/kernel.cuh"

namespace nsa::gpu {

/// Whether there is a kernel of CTAs of 4 warps: not where o has two parts.
template <class WarpTile>
constexpr bool has_small_ctas = WarpTile::parts == 1;
/// Warps of a CTA after a launch of cmp.
template <class WarpTile>
constexpr int warps_after_cmp = after_cmp_warps({WarpTile::d_k, WarpTile::d_v, WarpTile::heads, WarpTile::tuned});

/// Clusters of that size, of CTAs of W warps, that are resident at the same time; 0: none. `more_bytes`: of shared
/// memory, after the layout.
template <auto* kernel, class WarpTile, int W>
int count_active_clusters(const LayerShape& s, int cluster, int more_bytes = 0) {
  static int cached[fused_max_cluster + 1];  // count + 1; 0: not queried yet
  const std::size_t bytes = FusedSharedLayout<WarpTile, W>::bytes(s) + more_bytes;
  if (bytes > limits().shared_bytes) return 0;
  if (cached[cluster] > 0) return cached[cluster] - 1;
  cudaLaunchAttribute size{};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(limits().sms * cluster));
  config.blockDim = dim3(32 * W);
  config.dynamicSmemBytes = bytes;
  config.attrs = &size;
  config.numAttrs = 1;
  int count = 0;
  const bool queried =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)) ==
          cudaSuccess &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, cluster > 8) == cudaSuccess &&
      cudaOccupancyMaxActiveClusters(&count, kernel, &config) == cudaSuccess;
  if (!queried) {
    cudaGetLastError();  // clears the error: this cluster size is not supported
    count = 0;
  }
  cached[cluster] = count + 1;
  return count;
}

template <class WarpTile, class Params>
void launch_fused_decode_of(const Params& p, Stream* stream) {
  const dim3 grid(static_cast<unsigned>(p.tile.rows() * p.shape.groups * p.cluster));
  const auto launch = [&](auto* kernel, int bytes) {
    launch_pdl(kernel, grid, 32 * p.warps, bytes, stream, p.cluster, p);
  };
  const auto launch_of = [&](auto sums) {
    const auto launch_warps = [&](auto warps) {
      launch(fused_decode_kernel<WarpTile, warps, sums, Params>, FusedSharedLayout<WarpTile, warps>::bytes(p.shape));
    };
    if constexpr (Params::after_cmp) {
      launch_warps(std::integral_constant<int, warps_after_cmp<WarpTile>>{});
    } else {
      if (p.warps == fused_warps) return launch_warps(std::integral_constant<int, fused_warps>{});
      if constexpr (has_small_ctas<WarpTile> && !Params::projects)
        launch_warps(std::integral_constant<int, fused_warps_small>{});
    }
  };
  if constexpr (WarpTile::tuned && !Params::is_layer && !Params::after_cmp)
    if (!p.block_sums.memory) return launch_of(std::false_type{});
  launch_of(std::true_type{});
}

/// Calls f(std::type_identity<WarpTile>{}) with the warp tile of a storage type and shape.
template <DType Storage, bool Tuned, class F>
auto with_warp_tile(const LayerShape& s, F f) {
  if constexpr (Storage == DType::f32) {
    return f(std::type_identity<WarpTileScalar<64, 64>>{});
  } else {
    using T = std::conditional_t<Storage == DType::bf16, __nv_bfloat16, __half>;
    if constexpr (Tuned) {
      if (s.d_k == 64) return f(std::type_identity<WarpTileMma<T, 64, 64>>{});
      if (s.d_k == 128) return f(std::type_identity<WarpTileMma<T, 128, 128>>{});
      return f(std::type_identity<WarpTileMma<T, 192, 128>>{});
    } else {
      const DecodeInstance instance = fused_instance(s);
      if (instance.heads == 32) return f(std::type_identity<WarpTileMma<T, 128, 128, 2, false>>{});
      if (instance.d_k == 128) return f(std::type_identity<WarpTileMma<T, 128, 128, 1, false>>{});
      return f(std::type_identity<WarpTileMma<T, 256, 256, 1, false>>{});
    }
  }
}

template <DType Storage, bool Tuned>
int active_clusters(const LayerShape& s, int cluster) {
  return with_warp_tile<Storage, Tuned>(s, [&](auto tile) {
    using WarpTile = typename decltype(tile)::type;
    return count_active_clusters<fused_decode_kernel<WarpTile, fused_warps, true>, WarpTile, fused_warps>(s, cluster);
  });
}

template <DType Storage, bool Tuned, class Params>
void launch_fused_decode(const Params& p, Stream* stream) {
  with_warp_tile<Storage, Tuned>(p.shape,
                                 [&](auto tile) { launch_fused_decode_of<typename decltype(tile)::type>(p, stream); });
}

}  // namespace nsa::gpu
