"""Qwen2 and Qwen2.5: biases on q, k and v; windows only where `use_sliding_window` asks for them."""

from __future__ import annotations

from exporters.architectures.decoder import DecoderFamily
from exporters.config import Settings


def qwen_windows(settings: Settings) -> tuple[int, ...]:
    """`layer_types` decides where given, else the layers from `max_window_layers` on have the window."""
    if not settings.flag("use_sliding_window"):
        return (0,) * settings.layers
    window = settings.integer("sliding_window", 0)
    first = settings.integer("max_window_layers", settings.layers)
    kinds = settings.layer_types() or tuple(
        "sliding_attention" if layer >= first else "full_attention" for layer in range(settings.layers)
    )
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


QWEN2 = DecoderFamily(model_type="qwen2", qkv_bias=lambda settings: True, windows=qwen_windows)
