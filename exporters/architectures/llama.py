"""Llama 2 and 3: the common shape, with Llama 3's rope scaling."""

from __future__ import annotations

from exporters.architectures.decoder import DecoderFamily
from exporters.config import Settings


def _attention_bias(settings: Settings) -> bool:
    return settings.flag("attention_bias")


LLAMA = DecoderFamily(
    model_type="llama",
    qkv_bias=_attention_bias,
    output_bias=_attention_bias,
    mlp_bias=lambda settings: settings.flag("mlp_bias"),
)
