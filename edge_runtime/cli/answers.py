"""How a generation is shown: its tokens as they come, then what it took.

Knows: streams and results. Does not know: where they come from.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from edge_runtime.cli.output import note, paint, result

if TYPE_CHECKING:
    from edge_runtime.sdk.client import TokenStream
    from edge_runtime.sdk.remote_verifier import VerifiedTokens
    from edge_runtime.sdk.results import Result

DRAFT = "draft"  # as in `sdk.results`, which is not imported to list commands


def print_stream(stream: TokenStream | VerifiedTokens, *, quiet: bool = False) -> Result:
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
    note_source(answer)


def note_source(answer: Result) -> None:
    """A line, where the answer is not the target's."""
    if answer.answered_by != DRAFT:
        return
    since = f" from token {answer.target_tokens} on" if answer.target_tokens else ""
    mark = paint("answered_by: draft", "yellow", sys.stderr)
    note(f"{mark}{since}: this device's draft model, {answer.model}; {answer.offline_reason}")


def answer_json(answer: Result) -> dict[str, object]:
    fields = asdict(answer)
    del fields["question"]  # the caller asked it
    return fields
