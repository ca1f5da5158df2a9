"""Qwen3-MoE: Qwen3 with experts on most layers; the others keep a dense mlp."""

from __future__ import annotations

from exporters.architectures.decoder import DecoderFamily, Experts
from exporters.architectures.plan import ExpertNames
from exporters.architectures.qwen3 import attention_bias
from exporters.config import Settings

EXPERT_NAMES = ExpertNames(
    gate="mlp.experts.{expert}.gate_proj.weight",
    up="mlp.experts.{expert}.up_proj.weight",
    down="mlp.experts.{expert}.down_proj.weight",
    fused_gate_up="mlp.experts.gate_up_proj",
    fused_down="mlp.experts.down_proj",
)


def _is_sparse(settings: Settings, layer: int) -> bool:
    step = settings.positive("decoder_sparse_step", 1)
    return layer not in settings.integers("mlp_only_layers") and (layer + 1) % step == 0


def _windows(settings: Settings) -> tuple[int, ...]:
    window = settings.integer("sliding_window", 0) if settings.flag("use_sliding_window") else 0
    return (window,) * settings.layers


QWEN3_MOE = DecoderFamily(
    model_type="qwen3_moe",
    qkv_bias=attention_bias,
    output_bias=attention_bias,
    query_key_norm="head",
    windows=_windows,
    experts=Experts(intermediate="moe_intermediate_size", names=EXPERT_NAMES, top_k_default=8),
    is_sparse=_is_sparse,
)
