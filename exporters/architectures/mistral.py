"""Mistral: Llama with a sliding window on every layer."""

from __future__ import annotations

from exporters.architectures.decoder import DecoderFamily
from exporters.config import Settings


def window_everywhere(settings: Settings) -> tuple[int, ...]:
    """`sliding_window` on every layer; null means none."""
    return (settings.integer("sliding_window", 0),) * settings.layers


MISTRAL = DecoderFamily(model_type="mistral", windows=window_everywhere)
