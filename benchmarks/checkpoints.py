"""Random checkpoints of real shapes, made once and kept: speed does not depend on what the weights say.

Knows: the shape of Llama-3.2-1B with a vocabulary of 32 000 (1.04 B parameters), its Hugging Face layout. Does not
know: bundles or peers. Everything lands in `.bench/`, which git ignores.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

CACHE = Path(".bench")
WEIGHT_SCALE = 0.02


@dataclass(frozen=True)
class LlamaShape:
    """A Llama 3 architecture as numbers."""

    name: str
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_context_tokens: int = 8192
    rope_theta: float = 500_000.0
    norm_epsilon: float = 1e-5

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name inside a layer -> shape."""
        hidden, wide = self.hidden_size, self.intermediate_size
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj.weight": (q, hidden),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.v_proj.weight": (kv, hidden),
            "self_attn.o_proj.weight": (hidden, q),
            "mlp.gate_proj.weight": (wide, hidden),
            "mlp.up_proj.weight": (wide, hidden),
            "mlp.down_proj.weight": (hidden, wide),
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }


LLAMA_1B = LlamaShape("llama-1b", 2048, 8192, 16, 32, 8, 64, 32_000)
LLAMA_TINY = LlamaShape("llama-tiny", 256, 1024, 4, 8, 2, 32, 2_000)


def checkpoint(shape: LlamaShape) -> Path:
    """The Hugging Face directory of a random model, one shard per layer, float16. Written once."""
    path = CACHE / shape.name
    if (path / "config.json").exists():
        return path
    temporary = path.with_suffix(".writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _write(shape, temporary)
    temporary.rename(path)
    return path


def _write(shape: LlamaShape, path: Path) -> None:
    rng = np.random.default_rng(0)
    weight_map: dict[str, str] = {}

    def shard(name: str, tensors: dict[str, NDArray[np.float16]]) -> None:
        save_file(tensors, path / name)
        weight_map.update(dict.fromkeys(tensors, name))

    embedding = _random(rng, (shape.vocab_size, shape.hidden_size))
    norm = np.ones(shape.hidden_size, np.float16)
    shard("model-embed.safetensors", {"model.embed_tokens.weight": embedding, "model.norm.weight": norm})
    for layer in range(shape.layers):
        tensors = {
            f"model.layers.{layer}.{name}": _random(rng, size) for name, size in shape.layer_shapes().items()
        }
        shard(f"model-layer-{layer:02}.safetensors", tensors)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(_config(shape), indent=2))
    _write_tokenizer(shape, path)


def _random(rng: np.random.Generator, size: tuple[int, ...]) -> NDArray[np.float16]:
    if len(size) == 1:
        return np.ones(size, np.float16)
    return (rng.standard_normal(size, dtype=np.float32) * np.float32(WEIGHT_SCALE)).astype(np.float16)


def _config(shape: LlamaShape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_context_tokens,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float16",
    }


def _write_tokenizer(shape: LlamaShape, path: Path) -> None:
    """Word `tN` is id N: a benchmark chooses ids freely."""
    vocabulary = {f"t{i}": i for i in range(shape.vocab_size)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "t1", "eos_token": "t2"}))
