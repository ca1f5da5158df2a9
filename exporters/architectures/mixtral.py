"""Mixtral: Mistral with experts on every layer, gates from a softmax over the chosen ones."""

from __future__ import annotations

from exporters.architectures.decoder import DecoderFamily, Experts
from exporters.architectures.mistral import window_everywhere
from exporters.architectures.plan import ExpertNames

MIXTRAL = DecoderFamily(
    model_type="mixtral",
    norm_epsilon=1e-5,
    rope_theta=1e6,
    windows=window_everywhere,
    experts=Experts(
        intermediate="intermediate_size",
        names=ExpertNames(
            gate="block_sparse_moe.experts.{expert}.w1.weight",
            up="block_sparse_moe.experts.{expert}.w3.weight",
            down="block_sparse_moe.experts.{expert}.w2.weight",
            fused_gate_up="mlp.experts.gate_up_proj",
            fused_down="mlp.experts.down_proj",
        ),
        router=("block_sparse_moe.gate", "mlp.gate"),
        always_normalize=True,
        softmax_after=True,
    ),
)
