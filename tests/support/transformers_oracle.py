"""What transformers itself says: the outside oracle of the families."""

from __future__ import annotations

from pathlib import Path

import numpy as np

PROMPT = (np.random.default_rng(7).integers(0, 256, 48)).tolist()
NEW_TOKENS = 64


def oracle(checkpoint: Path) -> tuple[np.ndarray, list[int]]:
    """transformers' logits on the prompt and its 64 greedy tokens."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].numpy()
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
    return logits, made[0, len(PROMPT) :].tolist()
