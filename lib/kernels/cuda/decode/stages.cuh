#pragma once
// Attention of a whole decode step.

#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

/// All branches, rank and combine in one launch (decode/fused/launch.cu) or four (decode/attention.cu).
bool decode_attention_accepts(const AttentionArgs&);
void decode_attention(const AttentionArgs&, Stream*);
/// "step", "dealt" where the tiles of a ragged batch are dealt by length, or "tokens" of several query tokens.
const char* decode_attention_variant(const AttentionArgs&);
/// KernelTable::schedule_imbalance, of a rank that holds all K and V.
double schedule_imbalance(const LayerShape&, const QueryTile&, std::span<const std::int64_t> positions);

/// A layer of a step between project and output in one launch. decode/layer.cu
bool decode_layer_accepts(const DecodeLayerArgs&);
void decode_layer(const DecodeLayerArgs&, Stream*);

/// The launches between the exchanges of a step whose sequences are sharded over ranks. decode/sharded.cu
bool sharded_attention_accepts(const ShardedAttentionArgs&);
void local_attention(const ShardedAttentionArgs&, Stream*);
void normalise_partials(const ShardedAttentionArgs&, Stream*);
void merge_ranks(const ShardedAttentionArgs&, Stream*);

}  // namespace nsa::gpu
