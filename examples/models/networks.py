"""The two demo networks: untrained, read from a checkpoint, written as one.

Knows: their shapes and the layout on disk. Does not know: text, or how they are trained.
"""

from __future__ import annotations

from pathlib import Path

import torch
from text import END_OF_TEXT, VOCAB_SIZE
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

CONTEXT_TOKENS = 2048
BALANCE_WEIGHT = 0.01  # of the router's load-balancing loss
COMMON = {
    "vocab_size": VOCAB_SIZE,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT_TOKENS,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "bos_token_id": END_OF_TEXT,
    "eos_token_id": END_OF_TEXT,
    "pad_token_id": 3,
}


def untrained(kind: str) -> PreTrainedModel:
    """Random weights, float32. `kind`: "moe" (the target) or "draft"."""
    if kind == "draft":
        return Qwen3ForCausalLM(
            Qwen3Config(
                hidden_size=128,
                intermediate_size=384,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                **COMMON,
            )
        )
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            hidden_size=192,
            intermediate_size=512,
            moe_intermediate_size=128,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            num_experts=16,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            router_aux_loss_coef=BALANCE_WEIGHT,
            **COMMON,
        )
    )


def read_model(directory: Path) -> PreTrainedModel:
    """A checkpoint of either kind, as float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model


def for_training(model: PreTrainedModel) -> PreTrainedModel:
    if model.config.model_type == "qwen3_moe":
        model.set_experts_implementation("grouped_mm")
        model.config.output_router_logits = True
    return model


def set_rope_theta(model: PreTrainedModel, theta: float) -> None:
    """Another base of the rotary frequencies; the model has to get used to it.

    Matching what was read far back needs frequencies that hardly turn on the way: at 1e4 a head of 32 has 4 such pairs
    of 16 over 700 tokens, at 2e5 it has 7.
    """
    model.config.rope_parameters["rope_theta"] = theta
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


def sharpen_attention(model: PreTrainedModel, factor: float) -> None:
    """Queries of all layers but the first times `factor`: their gains bound how sharply one token is attended to."""
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.self_attn.q_norm.weight.mul_(factor)


def write_checkpoint(model: PreTrainedModel, tokenizer: Tokenizer, directory: Path) -> None:
    """Hugging Face layout, bfloat16; `model` itself is rounded too."""
    if model.config.model_type == "qwen3_moe":
        model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(directory)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        pad_token="<|pad|>",
        model_max_length=CONTEXT_TOKENS,
        chat_template="{% for message in messages %}{{ message['content'] }}\n{% endfor %}",
    ).save_pretrained(directory)
