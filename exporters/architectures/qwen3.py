"""Qwen3: RMS norms on each head of q and k."""

from __future__ import annotations

from exporters.architectures.decoder import DecoderFamily
from exporters.architectures.qwen2 import qwen_windows
from exporters.config import Settings


def attention_bias(settings: Settings) -> bool:
    return settings.flag("attention_bias")


QWEN3 = DecoderFamily(
    model_type="qwen3",
    qkv_bias=attention_bias,
    output_bias=attention_bias,
    query_key_norm="head",
    windows=qwen_windows,
)
