"""How good a demo model is on held-out text: bits per byte, copies, and how far a draft agrees with its target.

Knows: the prompts and the sums. Does not know: training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from copies import CopyMixture, edit
from text import Corpus, Ids
from transformers import PreTrainedModel

WINDOW_TOKENS = 512
SETTLED_TOKENS = 4  # of a second copy: before them nobody can know that it is one


def evenly_spaced(ids: Ids, windows: int, tokens: int = WINDOW_TOKENS) -> list[Ids]:
    """`windows` runs of `tokens` + 1 ids."""
    step = max(1, (len(ids) - tokens - 1) // windows)
    return [ids[start : start + tokens + 1] for start in range(0, windows * step, step)]


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Ids) -> torch.Tensor:
    """Float32 [tokens, vocabulary]."""
    logits: torch.Tensor = model(input_ids=torch.from_numpy(ids)[None], output_router_logits=False).logits
    return logits[0].float()


def bits_per_byte(model: PreTrainedModel, corpus: Corpus, windows: int) -> float:
    """Held-out cross entropy over evenly spaced windows, per byte of text."""
    model.eval()
    nats = tokens = 0.0
    for ids in evenly_spaced(corpus.held_out, windows):
        expected = torch.from_numpy(ids[1:])
        nats += torch.nn.functional.cross_entropy(
            logits_of(model, ids[:-1]), expected, reduction="sum"
        ).item()
        tokens += len(expected)
    model.train()
    return nats / tokens / math.log(2) * len(corpus.held_out) / corpus.held_out_bytes


@dataclass(frozen=True)
class CopyScores:
    """Shares of top tokens that are right; `first` on the spans' first appearance, for comparison."""

    first: float
    verbatim: float
    edited: float


def copy_scores(model: PreTrainedModel, corpus: Corpus, prompts: int) -> CopyScores:
    """Prompts of a held-out span (100 to 300 tokens), other text (50 to 400), and the span again."""
    model.eval()
    rng = np.random.default_rng(7)
    source = CopyMixture(corpus.held_out, corpus.tokenizer)
    first, verbatim, edited = [], [], []
    for _ in range(prompts):
        span = source.window(rng, int(rng.integers(100, 301)))
        filler = source.window(rng, int(rng.integers(50, 401)))
        text = corpus.tokenizer.decode(span.tolist(), skip_special_tokens=False)
        changed = edit(rng, text, corpus.tokenizer.decode(source.window(rng, 64).tolist()))
        again = np.array(corpus.tokenizer.encode(changed).ids, np.int64)
        hits = top_is_right(model, np.concatenate([span, filler, span]))
        first.append(hits[: len(span) - 1])
        verbatim.append(hits[-len(span) + SETTLED_TOKENS :])
        if len(again) > SETTLED_TOKENS:
            hits = top_is_right(model, np.concatenate([span, filler, again]))
            edited.append(hits[-len(again) + SETTLED_TOKENS :])
    model.train()
    means = [float(np.concatenate(each).mean()) for each in (first, verbatim, edited)]
    return CopyScores(*means)


def top_is_right(model: PreTrainedModel, ids: Ids) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Bool [tokens - 1]: is the top token after each prefix the next one?"""
    return (logits_of(model, ids[:-1]).argmax(-1).numpy() == ids[1:]).astype(bool)


@dataclass(frozen=True)
class Agreement:
    """Of a draft with its target, means over positions; `greedy`: same top token, `overlap`: 1 - TV at T = 1."""

    greedy: float
    overlap: float


def agreement(target: PreTrainedModel, draft: PreTrainedModel, windows: list[Ids]) -> Agreement:
    target.eval()
    draft.eval()
    greedy, overlap = [], []
    for ids in windows:
        p, q = (logits_of(model, ids[:-1]).softmax(-1) for model in (target, draft))
        greedy.append((p.argmax(-1) == q.argmax(-1)).float())
        overlap.append(torch.minimum(p, q).sum(-1))
    draft.train()
    return Agreement(torch.cat(greedy).mean().item(), torch.cat(overlap).mean().item())
