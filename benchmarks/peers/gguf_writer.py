"""A random checkpoint as GGUF Q4_0, for llama.cpp. Runs inside the peers' environment.

`python gguf_writer.py CHECKPOINT OUT.gguf`: written as float16 first, then rounded by llama.cpp's own quantizer, which
gives a tied head 6 bits (Q6_K).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from safetensors.numpy import load_file

NAMES = {
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}


def interleave(weights: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring pairs, Hugging Face halves: reorder the rows of q and k."""
    out, width = weights.shape
    return weights.reshape(heads, 2, out // heads // 2, width).swapaxes(1, 2).reshape(out, width)


def add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    vocab = config["vocab_size"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(vocab)])
    writer.add_token_scores([0.0] * vocab)
    types = [gguf.TokenType.CONTROL if i < 3 else gguf.TokenType.NORMAL for i in range(vocab)]
    writer.add_token_types(types)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def write_float16(checkpoint: Path, out: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(out, "llama", use_temp_file=True)
    add_metadata(writer, config)

    def add(name: str, weights: np.ndarray) -> None:
        writer.add_tensor(name, weights.astype(np.float32 if weights.ndim == 1 else np.float16))

    shared = load_file(checkpoint / "model-embed.safetensors")
    add("token_embd.weight", shared["model.embed_tokens.weight"])
    add("output_norm.weight", shared["model.norm.weight"])
    heads = {"attn_q.weight": config["num_attention_heads"], "attn_k.weight": config["num_key_value_heads"]}
    for layer in range(config["num_hidden_layers"]):
        for name, weights in load_file(checkpoint / f"model-layer-{layer:02}.safetensors").items():
            short = NAMES[name.removeprefix(f"model.layers.{layer}.")]
            if short in heads:
                weights = interleave(weights, heads[short])
            add(f"blk.{layer}.{short}", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, out: Path) -> None:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), parameters):
        raise SystemExit("llama.cpp could not quantize the model")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    float16, temporary = arguments.out.with_suffix(".f16"), arguments.out.with_suffix(".writing")
    write_float16(arguments.checkpoint, float16)
    quantize(float16, temporary)
    float16.unlink()
    temporary.rename(arguments.out)


if __name__ == "__main__":
    main()
