"""The planner's view of a model, from the manifest of its bundle.

Knows: which slices belong to layers, embedding and head. Does not know: devices.
"""

from __future__ import annotations

from collections.abc import Iterable

from coordinator.planning.model import ModelProfile
from edge_runtime.bundle.manifest import Block, Manifest

BYTES_PER_VALUE = 4  # of a hidden row on a link: float32


def model_profile(manifest: Manifest, kv_tokens_wanted: int) -> ModelProfile:
    """`kv_tokens_wanted`: KV room each stage must have beside its weights."""
    embedding, head = set(manifest.embedding.slices), set(manifest.head.slices)
    ends = embedding | head
    return ModelProfile(
        layer_weight_bytes=tuple(_bytes(manifest, set(layer.slices) - ends) for layer in manifest.layers),
        embedding_bytes=_bytes(manifest, embedding),
        head_bytes=_bytes(manifest, head - embedding),
        tied=bool(embedding & head),
        hidden_bytes_per_row=manifest.model.hidden_size * BYTES_PER_VALUE,
        kv_bytes_per_token_per_layer=manifest.model.kv_bytes_per_token_per_layer,
        kv_tokens_wanted=kv_tokens_wanted,
    )


def bytes_read_per_token(manifest: Manifest, block: Block) -> float:
    """Of a block's weights, those one decoded row touches: of experts, the ones that are chosen."""
    total = float(_bytes(manifest, block.slices))
    for operation in block.operations:
        if operation.kind == "experts":
            tensor = manifest.tensors[operation.weights["experts"]]
            skipped = 1 - int(operation.attributes["top_k"]) / int(operation.attributes["experts"])
            total -= tensor.expert_stride_bytes * tensor.shape[0] * skipped
    return max(total, 0.0)


def _bytes(manifest: Manifest, keys: Iterable[str]) -> int:
    return sum(manifest.slices[key].size_bytes for key in keys)
