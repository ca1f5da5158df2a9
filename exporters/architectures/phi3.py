"""Phi-3: Llama stored with fused q, k, v and gate, up; longrope on the long-context models."""

from __future__ import annotations

from exporters.architectures.decoder import DecoderFamily
from exporters.architectures.mistral import window_everywhere

PHI3 = DecoderFamily(model_type="phi3", norm_epsilon=1e-5, fused_projections=True, windows=window_everywhere)
