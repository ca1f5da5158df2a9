"""Train a demo checkpoint: `python examples/models/train.py {moe,draft} --minutes N --out DIRECTORY`.

Text: the Python standard library's own source as installed (PSF licence), 5 % of the files held out by a hash of their
path. Runs on two CPU cores; needs torch, transformers and tokenizers.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

VOCAB_SIZE = 4096
BATCH_SEQUENCES = 16
SEQUENCE_TOKENS = 512
MAX_FILE_BYTES = 400_000
HELD_OUT_ONE_IN = 20
WARMUP_STEPS = 100
REPORT_EVERY_STEPS = 200
BALANCE_WEIGHT = 0.01  # of the router's load-balancing loss
END_OF_TEXT = 0
# Newlines with their indentation, words and identifiers, up to three digits, punctuation, spaces.
WORDS = r"\n+ *| ?[A-Za-z_]+| ?[0-9]{1,3}| ?[^\sA-Za-z0-9_]+| +"


@dataclass(frozen=True)
class SourceFile:
    text: str
    is_held_out: bool


def standard_library() -> Iterator[SourceFile]:
    root = Path(os.__file__).parent
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if "site-packages" in relative.parts or "encodings" in relative.parts:
            continue
        if path.stat().st_size < MAX_FILE_BYTES:
            hashed = int(hashlib.sha256(str(relative).encode()).hexdigest(), 16)
            text = path.read_text(encoding="utf-8", errors="replace")
            yield SourceFile(text, hashed % HELD_OUT_ONE_IN == 0)


def train_tokenizer(texts: Iterator[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build_model(kind: str) -> tuple[PreTrainedModel, float]:
    """The untrained model and its peak learning rate."""
    common = {
        "vocab_size": VOCAB_SIZE,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "rope_theta": 10000.0,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": END_OF_TEXT,
        "pad_token_id": 3,
    }
    if kind == "draft":
        config = Qwen3Config(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            **common,
        )
        return Qwen3ForCausalLM(config), 3e-3
    model = Qwen3MoeForCausalLM(
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
            output_router_logits=True,
            router_aux_loss_coef=BALANCE_WEIGHT,
            **common,
        )
    )
    model.set_experts_implementation("grouped_mm")
    return model, 2e-3


class Corpus:
    """Token ids of the training and the held-out files."""

    def __init__(self) -> None:
        files = list(standard_library())
        self.tokenizer = train_tokenizer(file.text for file in files if not file.is_held_out)
        train = [self._encode(file.text) for file in files if not file.is_held_out]
        np.random.default_rng(0).shuffle(train)  # type: ignore[arg-type]
        self.train = np.concatenate(train)
        self.held_out = np.concatenate([self._encode(file.text) for file in files if file.is_held_out])
        self.held_out_bytes = sum(len(file.text.encode()) for file in files if file.is_held_out)

    def _encode(self, text: str) -> NDArray[np.int64]:
        return np.array([*self.tokenizer.encode(text).ids, END_OF_TEXT], np.int64)

    def batch(self, rng: np.random.Generator) -> torch.Tensor:
        starts = rng.integers(0, len(self.train) - SEQUENCE_TOKENS - 1, BATCH_SEQUENCES)
        return torch.from_numpy(np.stack([self.train[i : i + SEQUENCE_TOKENS + 1] for i in starts]))

    @torch.no_grad()
    def bits_per_byte(self, model: PreTrainedModel, windows: int) -> float:
        """Held-out cross entropy over evenly spaced windows, per byte of text."""
        model.eval()
        span = len(self.held_out) - SEQUENCE_TOKENS - 1
        nats = tokens = 0.0
        for start in range(0, span, max(1, span // windows)):
            ids = torch.from_numpy(self.held_out[start : start + SEQUENCE_TOKENS + 1])[None]
            logits = model(input_ids=ids[:, :-1]).logits.float()[0]
            nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            tokens += SEQUENCE_TOKENS
        model.train()
        return nats / tokens / math.log(2) * len(self.held_out) / self.held_out_bytes


def make_optimizer(model: PreTrainedModel, rate: float) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))


def learning_rate_scale(step: int, progress: float) -> float:
    """Linear warm-up, then a cosine from 1 to 0.05 over the time given."""
    return min(1.0, step / WARMUP_STEPS) * (0.05 + 0.475 * (1 + math.cos(math.pi * progress)))


def train_step(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, ids: torch.Tensor, kind: str
) -> None:
    output = model(input_ids=ids[:, :-1])
    loss = torch.nn.functional.cross_entropy(output.logits.reshape(-1, VOCAB_SIZE), ids[:, 1:].reshape(-1))
    if kind == "moe":
        experts, used = model.config.num_experts, model.config.num_experts_per_tok
        loss = loss + BALANCE_WEIGHT * load_balancing_loss_func(output.router_logits, experts, used)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def train(kind: str, minutes: float, out: Path) -> None:
    torch.manual_seed(0)
    corpus = Corpus()
    model, rate = build_model(kind)
    optimizer = make_optimizer(model, rate)
    begin, step, rng = time.monotonic(), 0, np.random.default_rng(1)
    while (progress := (time.monotonic() - begin) / (minutes * 60)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * learning_rate_scale(step, progress)
        train_step(model, optimizer, corpus.batch(rng), kind)
        step += 1
        if step % REPORT_EVERY_STEPS == 0:
            bits = corpus.bits_per_byte(model, 20)
            print(f"step {step}, {progress:.0%} of the time, held-out bits/byte {bits:.3f}", flush=True)
    print(f"{step} steps, held-out bits/byte {corpus.bits_per_byte(model, 400):.3f}")
    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_object=corpus.tokenizer,
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        pad_token="<|pad|>",
        model_max_length=2048,
        chat_template="{% for message in messages %}{{ message['content'] }}\n{% endfor %}",
    ).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kind", choices=["moe", "draft"])
    parser.add_argument("--minutes", type=float, required=True, help="how long to train")
    parser.add_argument("--out", type=Path, required=True, help="directory of the new checkpoint")
    arguments = parser.parse_args()
    train(arguments.kind, arguments.minutes, arguments.out)


if __name__ == "__main__":
    main()
