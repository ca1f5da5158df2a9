"""How a generation is shown: its tokens as they come, then what it took.

Knows: streams and results. Does not know: where they come from.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from edge_runtime.cli.output import note, result

if TYPE_CHECKING:
    from edge_runtime.sdk.client import TokenStream
    from edge_runtime.sdk.results import Result


def print_stream(stream: TokenStream, *, quiet: bool = False) -> Result:
    """Text to stdout while it comes; `quiet` only waits for it. Leaving early cancels the generation."""
    with stream:
        for token in stream:
            if not quiet and token.text:
                result(token.text, end="")
    if not quiet:
        result("")
    return stream.result


def note_speed(answer: Result) -> None:
    timings = answer.timings
    accepted, rejected = answer.accepted_draft_tokens, answer.rejected_draft_tokens
    drafts = f", {accepted} of {accepted + rejected} drafts right" if accepted + rejected else ""
    note(
        f"{len(answer.token_ids)} tokens, {timings.tokens_per_second:.1f} tokens/s,"
        f" first after {timings.ttft_seconds * 1e3:.0f} ms, seed {answer.seed}, {answer.finish_reason}{drafts}"
    )


def answer_json(answer: Result) -> dict[str, object]:
    return asdict(answer)
