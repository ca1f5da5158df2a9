"""transformers on the CPU in bfloat16, the same questions and answers as `llamacpp.py`. For information only."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
import transformers


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.bfloat16)
    tell({"program": f"transformers {transformers.__version__}, torch {torch.__version__}"})
    for line in sys.stdin:
        question = json.loads(line)
        ids = torch.randint(3, model.config.vocab_size, (1, question["prompt"]))
        tell({"seconds": seconds(model, ids, question.get("tokens", 0))})


@torch.inference_mode()
def seconds(model: torch.nn.Module, ids: torch.Tensor, tokens: int) -> float:
    """Of the prompt where no tokens are asked for, else of `tokens` greedy steps after it."""
    begin = time.perf_counter()
    out = model(ids, use_cache=True, logits_to_keep=1)
    if not tokens:
        return time.perf_counter() - begin
    begin = time.perf_counter()
    for _ in range(tokens):
        out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
    return time.perf_counter() - begin


def tell(value: Mapping[str, Any]) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
