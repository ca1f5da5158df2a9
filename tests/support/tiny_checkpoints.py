"""Tiny random checkpoints of every family, made by transformers, with nothing left at a value that hides a bug.

Norm weights are not 1, biases not 0, windows shorter than the sequences, soft caps small enough to bend, key-value
heads shared. `to_classic` rewrites one as checkpoints on the hub looked before transformers 5.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB = 320
LAYERS = 4
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "pad_token_id": 256,
    "tie_word_embeddings": False,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.4, 1.6, 1.9, 2.0, 2.2],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
}
# family -> (class prefix, what differs from the common config)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": _LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 11, "head_dim": 24}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 13, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 17}),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": False}),
    "phi3": (
        "Phi3",
        {
            "sliding_window": 19,
            "rope_parameters": _LONGROPE,
            "original_max_position_embeddings": 128,
        },
    ),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 16,
            "sliding_window": 7,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 0.5,
            "tie_word_embeddings": True,
        },
    ),
}
GENERATORS = tuple(FAMILIES)


def build(family: str, directory: Path) -> Path:
    """A checkpoint of a decoder family, or "bert", as transformers saves it."""
    import torch
    import transformers

    torch.manual_seed(sum(map(ord, family)))
    if family == "bert":
        model = transformers.BertModel(_bert_config(), add_pooling_layer=False)
    else:
        prefix, different = FAMILIES[family]
        config = getattr(transformers, f"{prefix}Config")(**(_COMMON | different))
        model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    _shake(model)
    model.eval().save_pretrained(directory)
    byte_tokenizer(bos=family != "bert").save(str(directory / "tokenizer.json"))
    return directory


def _bert_config() -> Any:
    import transformers

    return transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=128,
    )


def _shake(model: Any) -> None:
    """Matrices large enough that every part of the model shows in the logits; no vector at its initial value."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            elif "embed" in name:  # of a tied model, small: it would predict its own input for ever
                parameter.copy_(noise * (0.03 if model.config.tie_word_embeddings else 1.0))
            elif name.endswith("gate.weight"):
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)


def byte_tokenizer(*, bos: bool) -> Tokenizer:
    """One token a byte, then <pad>, <s>, </s> at 256, 257 and 258."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    return tokenizer


def read_tensors(directory: Path) -> dict[str, np.ndarray[Any, Any]]:
    return safetensors.numpy.load_file(directory / "model.safetensors")


def to_classic(source: Path, target: Path) -> Path:
    """The same model as older tools wrote it: `rope_theta`, `rope_scaling`, `num_experts`, a tensor per expert."""
    config = json.loads((source / "config.json").read_text())
    rope = config.pop("rope_parameters", None)
    if rope is not None:
        config["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type")
        rope.pop("partial_rotary_factor", None)
        config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    for new, old in (("dtype", "torch_dtype"), ("layer_types", None)):
        value = config.pop(new, None)
        if old is not None and value is not None:
            config[old] = value
    if config["model_type"] != "mixtral" and "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    return _write(target, source, config, _split_experts(read_tensors(source), config["model_type"]))


def to_fused(source: Path, target: Path) -> Path:
    """The same model with each layer's experts in two tensors and `num_local_experts`."""
    config = json.loads((source / "config.json").read_text())
    if "num_experts" in config:
        config["num_local_experts"] = config.pop("num_experts")
    return _write(target, source, config, _fuse_experts(read_tensors(source)))


def _write(
    target: Path, source: Path, config: dict[str, Any], tensors: dict[str, np.ndarray[Any, Any]]
) -> Path:
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(config))
    (target / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(contiguous, target / "model.safetensors")
    return target


_EXPERT = re.compile(r"(.*)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight")
_PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def _fuse_experts(tensors: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    out: dict[str, np.ndarray[Any, Any]] = {}
    experts: dict[str, dict[str, dict[int, np.ndarray[Any, Any]]]] = {}
    for name, tensor in tensors.items():
        if match := _EXPERT.fullmatch(name):
            layer, number, projection = match.groups()
            kind = _PROJECTIONS.get(projection, projection)
            experts.setdefault(layer, {}).setdefault(kind, {})[int(number)] = tensor
        else:
            out[name.replace("block_sparse_moe.gate", "mlp.gate")] = tensor
    for layer, parts in experts.items():
        numbers = range(len(parts["down_proj"]))
        both = [np.concatenate([parts["gate_proj"][n], parts["up_proj"][n]]) for n in numbers]
        out[f"{layer}.mlp.experts.gate_up_proj"] = np.stack(both)
        out[f"{layer}.mlp.experts.down_proj"] = np.stack([parts["down_proj"][n] for n in numbers])
    return out


def _split_experts(tensors: dict[str, np.ndarray[Any, Any]], family: str) -> dict[str, np.ndarray[Any, Any]]:
    out: dict[str, np.ndarray[Any, Any]] = {}
    mixtral = family == "mixtral"
    spell = {"gate": "w1", "up": "w3", "down": "w2"} if mixtral else {}
    for name, tensor in tensors.items():
        base, _, last = name.rpartition(".")
        base = base.replace(".mlp.experts", ".block_sparse_moe.experts") if mixtral else base
        if last == "gate_up_proj":
            halves = np.split(tensor, 2, axis=1)
            parts = {"gate": halves[0], "up": halves[1]}
        elif last == "down_proj":
            parts = {"down": tensor}
        else:
            out[name.replace(".mlp.gate.", ".block_sparse_moe.gate.") if mixtral else name] = tensor
            continue
        for part, stacked in parts.items():
            for expert, matrix in enumerate(stacked):
                out[f"{base}.{expert}.{spell.get(part, f'{part}_proj')}.weight"] = matrix
    return out
