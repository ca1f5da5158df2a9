"""Train a demo checkpoint, from nothing or going on from one; distil the draft from the target.

    python examples/models/train.py moe --steps 1300 --out moe
    python examples/models/train.py moe --start moe --rate 1e-3 --steps 500 --out moe-2
    python examples/models/train.py draft --start draft --teacher moe-2 --steps 1000 --out draft-2

Text: the Python standard library's own source as installed (PSF licence), most of it in documents that copy and edit
earlier spans of themselves. Runs on two CPU cores; needs torch, transformers and tokenizers. `--state FILE` keeps what
a run needs to go on after a stop.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from copies import CopyMixture
from muon import Muon
from networks import (
    BALANCE_WEIGHT,
    for_training,
    read_model,
    set_rope_theta,
    sharpen_attention,
    untrained,
    write_checkpoint,
)
from scores import agreement, bits_per_byte, copy_scores, evenly_spaced
from text import VOCAB_SIZE, Corpus
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

STEP_TOKENS = 4096
# Tokens of a row and how often: long rows are for copies from far back, and cost more.
ROW_TOKENS, ROW_SHARES = (512, 1024, 2048), (0.45, 0.4, 0.15)
PEAK_RATE = {"moe": 2e-3, "draft": 3e-3}
WARMUP_STEPS = 30
DECAY_SHARE = 0.35  # of the steps, at the end
LEAST_RATE = 0.02
# How sharp attention can be is bound by the gains of its normalised queries and keys, and those start at 1.
SHARPNESS_RATE_SCALE = 5.0
REPORT_EVERY_STEPS = 150
KEEP_EVERY_STEPS = 50


@dataclass(frozen=True)
class Plan:
    kind: str
    steps: int
    rate: float
    start: Path | None
    teacher: Path | None
    state: Path | None
    out: Path
    plain: float
    scrambled: float
    rewritten: float
    rope_theta: float | None
    sharpen: float
    seed: int


def make_optimizers(model: PreTrainedModel, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between the embedding and the head, AdamW for the rest."""
    table = model.get_input_embeddings().weight
    hidden = [p for p in model.parameters() if p.ndim > 1 and p is not table]
    named = [(name, p) for name, p in model.named_parameters() if p.ndim == 1]
    sharpness = [p for name, p in named if name.endswith(("q_norm.weight", "k_norm.weight"))]
    others = [p for name, p in named if not name.endswith(("q_norm.weight", "k_norm.weight"))]
    groups = [
        {"params": [table], "weight_decay": 0.05},
        {"params": others, "weight_decay": 0.0},
        {"params": sharpness, "weight_decay": 0.0, "rate_scale": SHARPNESS_RATE_SCALE},
    ]
    return [Muon(hidden, rate), torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))]


def learning_rate_scale(step: int, steps: int) -> float:
    """Linear warm-up, level, linear down to LEAST_RATE: a run in its level part can be given more or fewer steps."""
    left = (steps - step) / (DECAY_SHARE * steps)
    return min(1.0, (step + 1) / WARMUP_STEPS) * max(LEAST_RATE, min(1.0, left))


def batch(mixture: CopyMixture, step: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, int64 [rows, tokens + 1], and their weights, float32; a function of the step and the seed alone."""
    rng = np.random.default_rng((seed, step))
    tokens = int(rng.choice(ROW_TOKENS, p=ROW_SHARES))
    ids, weights = mixture.rows(rng, STEP_TOKENS // tokens, tokens + 1)
    return torch.from_numpy(ids), torch.from_numpy(weights)


def text_loss(model: PreTrainedModel, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Cross entropy with the text, nats per weight; for experts also how unevenly they are used."""
    output = model.model(input_ids=ids[:, :-1])
    weights = weights[:, 1:].reshape(-1)
    counts = weights > 0  # the head is a third of a step: not for tokens that count nothing
    logits = model.lm_head(output.last_hidden_state.reshape(len(weights), -1)[counts])
    nats = cross_entropy(logits, ids[:, 1:].reshape(-1)[counts], reduction="none")
    loss = (nats * weights[counts]).sum() / weights.sum().clamp(min=1.0)
    if model.config.model_type == "qwen3_moe":
        experts, used = model.config.num_experts, model.config.num_experts_per_tok
        loss = loss + BALANCE_WEIGHT * load_balancing_loss_func(output.router_logits, experts, used)
    return loss


def distillation_loss(
    draft: PreTrainedModel, teacher: PreTrainedModel, ids: torch.Tensor, variation_share: float
) -> torch.Tensor:
    """KL(teacher || draft), of which `variation_share` is replaced by the total variation between them.

    The total variation is what acceptance loses, but its gradient says little while the two are far apart; so it comes
    in late (DistillSpec, Zhou et al. 2024, compares such divergences).
    """
    with torch.no_grad():
        p = teacher(input_ids=ids[:, :-1]).logits.reshape(-1, VOCAB_SIZE).softmax(-1)
    log_q = draft(input_ids=ids[:, :-1]).logits.reshape(-1, VOCAB_SIZE).log_softmax(-1)
    loss = -(p * log_q).sum(-1).mean()  # the KL but for the teacher's own entropy, a constant
    if variation_share == 0:
        return loss
    variation = 0.5 * (p - log_q.exp()).abs().sum(-1).mean()
    return (1 - variation_share) * loss + variation_share * VARIATION_SCALE * variation


VARIATION_SCALE = 4.0  # brings its gradient to about the size of the KL's


class Run:
    """A model in training, and its step."""

    def __init__(self, plan: Plan, corpus: Corpus) -> None:
        self.plan, self.corpus, self.step = plan, corpus, 0
        self.mixture = CopyMixture(
            corpus.train,
            corpus.tokenizer,
            plain_share=plan.plain,
            scrambled_share=plan.scrambled,
            rewritten_share=plan.rewritten,
        )
        self.model = for_training(read_model(plan.start) if plan.start else untrained(plan.kind))
        if plan.rope_theta:
            set_rope_theta(self.model, plan.rope_theta)
        sharpen_attention(self.model, plan.sharpen)
        self.model.train()
        self.teacher = read_model(plan.teacher).eval() if plan.teacher else None
        self.optimizers = make_optimizers(self.model, plan.rate)
        if plan.state and plan.state.exists():
            kept = torch.load(plan.state)
            self.model.load_state_dict(kept["model"])
            for optimizer, its in zip(self.optimizers, kept["optimizers"], strict=True):
                optimizer.load_state_dict(its)
            self.step = kept["step"]

    def keep(self) -> None:
        """Write the state beside its place first, so that a stop at any time leaves a whole one."""
        if self.plan.state:
            fresh = self.plan.state.with_suffix(".fresh")
            optimizers = [each.state_dict() for each in self.optimizers]
            torch.save({"model": self.model.state_dict(), "optimizers": optimizers, "step": self.step}, fresh)
            fresh.replace(self.plan.state)

    def advance(self) -> float:
        """One step; returns its loss."""
        rate = self.plan.rate * learning_rate_scale(self.step, self.plan.steps)
        for group in (group for each in self.optimizers for group in each.param_groups):
            group["lr"] = rate * group.get("rate_scale", 1.0)
        loss = self.loss(*batch(self.mixture, self.step, self.plan.seed))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return loss.item()

    def loss(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if self.teacher is None:
            return text_loss(self.model, ids, weights)
        progress = self.step / self.plan.steps
        return distillation_loss(self.model, self.teacher, ids, max(0.0, 2 * progress - 1))

    def report(self, windows: int, prompts: int) -> str:
        bits = bits_per_byte(self.model, self.corpus, windows)
        copies = copy_scores(self.model, self.corpus, prompts)
        line = (
            f"held-out bits/byte {bits:.4f}, copies {copies.verbatim:.3f}, edited copies {copies.edited:.3f}"
        )
        if self.teacher is not None:
            both = agreement(self.teacher, self.model, evenly_spaced(self.corpus.held_out, windows))
            line += f", same top token {both.greedy:.4f}, 1 - TV {both.overlap:.4f}"
        return line


def train(plan: Plan) -> None:
    torch.manual_seed(0)
    run = Run(plan, Corpus(Tokenizer.from_file(str(plan.start / "tokenizer.json")) if plan.start else None))
    print(f"start at step {run.step}: {run.report(20, 8)}", flush=True)
    begin = time.process_time()
    while run.step < plan.steps:
        loss = run.advance()
        if run.step % KEEP_EVERY_STEPS == 0:
            run.keep()
            print(f"step {run.step}, loss {loss:.3f}, {time.process_time() - begin:.0f} CPU s", flush=True)
        if run.step % REPORT_EVERY_STEPS == 0:
            print(f"step {run.step}: {run.report(20, 8)}", flush=True)
    write_checkpoint(run.model, run.corpus.tokenizer, plan.out)
    print(f"{run.step} steps, rounded to bfloat16: ", end="", flush=True)
    run.model.float()
    print(run.report(100, 40))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kind", choices=["moe", "draft"])
    parser.add_argument("--steps", type=int, required=True, help=f"of {STEP_TOKENS} tokens")
    parser.add_argument(
        "--rate", type=float, help="peak learning rate; the default is for a start from nothing"
    )
    parser.add_argument("--start", type=Path, help="checkpoint to go on from, and its tokenizer")
    parser.add_argument(
        "--teacher", type=Path, help="learn this checkpoint's distributions in place of the text"
    )
    parser.add_argument("--plain", type=float, default=0.4, help="share of rows that are plain text")
    parser.add_argument("--scrambled", type=float, default=0.0, help="share of scrambled documents")
    parser.add_argument(
        "--rewritten",
        type=float,
        default=0.0,
        help="share of documents of spans and their copies, a name changed",
    )
    parser.add_argument(
        "--rope-theta", type=float, help="another base of the rotary frequencies to go on with"
    )
    parser.add_argument(
        "--sharpen", type=float, default=1.0, help="factor on the query gains behind the first layer"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the text's order; another one to go on with")
    parser.add_argument("--state", type=Path, help="file to keep the run's state in, and to go on from")
    parser.add_argument("--out", type=Path, required=True, help="directory of the new checkpoint")
    arguments = parser.parse_args()
    arguments.rate = arguments.rate or PEAK_RATE[arguments.kind]
    torch.set_num_threads(2)
    train(Plan(**vars(arguments)))


if __name__ == "__main__":
    main()
