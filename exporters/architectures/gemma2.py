"""Gemma 2: norms stored as w - 1, on both sides; soft caps; a window on every other layer; scaled embeddings."""

from __future__ import annotations

from edge_runtime.errors import ExportError
from exporters.architectures.decoder import DecoderFamily
from exporters.config import Settings


def _windows(settings: Settings) -> tuple[int, ...]:
    """Even layers have the window, unless `layer_types` says otherwise."""
    window = settings.integer("sliding_window", 0)
    kinds = settings.layer_types() or ("sliding_attention", "full_attention") * settings.layers
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds[: settings.layers])


def _attention_scale(settings: Settings) -> float:
    scalar = settings.number("query_pre_attn_scalar", 256)
    if scalar <= 0:
        raise ExportError("config.json: query_pre_attn_scalar must be above 0", hint="download it again")
    return float(scalar**-0.5)


def _attention_bias(settings: Settings) -> bool:
    return settings.flag("attention_bias")


GEMMA2 = DecoderFamily(
    model_type="gemma2",
    tied=True,
    qkv_bias=_attention_bias,
    output_bias=_attention_bias,
    sandwich_norms=True,
    norm_offset=1.0,
    embedding_factor=lambda settings: float(settings.positive("hidden_size") ** 0.5),
    attention_scale=_attention_scale,
    attention_softcap="attn_logit_softcapping",
    final_softcap="final_logit_softcapping",
    activation="gelu_pytorch_tanh",
    windows=_windows,
    unsupported=("use_bidirectional_attention",),
)
