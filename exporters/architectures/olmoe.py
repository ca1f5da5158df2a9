"""OLMoE: RMS norms over the whole rows of q and k, experts on every layer."""

from __future__ import annotations

from exporters.architectures.decoder import DecoderFamily, Experts
from exporters.architectures.qwen3 import attention_bias
from exporters.architectures.qwen3_moe import EXPERT_NAMES

OLMOE = DecoderFamily(
    model_type="olmoe",
    norm_epsilon=1e-5,
    qkv_bias=attention_bias,
    output_bias=attention_bias,
    query_key_norm="row",
    experts=Experts(intermediate="intermediate_size", names=EXPERT_NAMES, top_k_default=8),
    unsupported=("clip_qkv",),
)
