"""Which id a server finds likeliest at one place of a prompt, from the log-probabilities it gives there.

A draft is right iff it is that id. What contradicts itself is refused: a server whose ranks can't be trusted would make
a text that its model would not write.

Knows: candidates of one place. Does not know: formats, windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edge_runtime.errors import ProtocolError
from edge_runtime.speculative.verifiers.base import INCONSISTENT

TOLERANCE_NATS = 1e-3  # ranks and log-probabilities may come from different roundings
_LEAST = -1e30


@dataclass(frozen=True, slots=True)
class Candidate:
    """`logprob` in nats. `rank`: 1 for the likeliest; None where the server does not say."""

    id: int
    logprob: float
    rank: int | None = None


def likeliest(candidates: Sequence[Candidate], drafted: int, position: int) -> int:
    """The id of rank 1, which has the highest log-probability. `drafted` must be among the candidates.

    Raises ProtocolError (code "inconsistent_logprobs") for what can't be true.
    """
    by_id = {candidate.id: candidate for candidate in candidates}
    if len(by_id) != len(candidates) or drafted not in by_id:
        raise _contradiction(position, f"the token {drafted} of the prompt stands there not once")
    if any(not candidate.logprob <= TOLERANCE_NATS for candidate in candidates):
        raise _contradiction(position, "a log-probability above 0, or not a number")
    ranked = [candidate for candidate in candidates if candidate.rank is not None]
    first = [candidate for candidate in ranked if candidate.rank == 1]
    if ranked and len(first) != 1:
        raise _contradiction(position, f"{len(first)} tokens of rank 1")
    best = first[0] if first else max(candidates, key=lambda candidate: candidate.logprob)
    if any(candidate.logprob > best.logprob + TOLERANCE_NATS for candidate in candidates):
        raise _contradiction(position, "a token of a lower rank is more probable than that of rank 1")
    return best.id


def logprob_of(value: Any) -> float:
    """A log-probability out of JSON; servers write minus infinity in several ways."""
    if value is None or value == "-Infinity":
        return _LEAST
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ProtocolError(f"the server gave {value!r} as a log-probability")
    return float(min(max(value, _LEAST), -_LEAST))


def _contradiction(position: int, what: str) -> ProtocolError:
    return ProtocolError(
        f"the server's log-probabilities contradict themselves at position {position}: {what}",
        hint="its answers can't decide about drafts; ask without drafts, or update the server",
        code=INCONSISTENT,
    )
