"""What can happen to a stage, and what it may want done: the vocabulary of `pipeline_state`.

Knows: events (something arrived or was finished) and instructions (send, run, drop, load), as values.
Does not know: sockets, threads, clocks, or engines; rows are opaque arrays to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from edge_runtime.core import SamplingParams, SessionId, Token
from edge_runtime.engine.side_rows import NO_SIDES, SideRows
from edge_runtime.protocol.messages import LoadStage, Message

Rows = NDArray[np.float32]

COORDINATOR = ""  # as a source or destination, in place of a device id
MAX_DECODE_ROWS = 64  # of one step: beyond it a step gets slower for everyone without doing more per second
TURN_ROWS = (
    256  # of a prompt, after which others have a turn: most end in one, in the order in which they came
)


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """Consecutive rows of one session, `sides` beside them, queued for the compute thread; FIFO within a session."""

    lease: int
    session: SessionId
    turn: int
    seq: int
    base_row: int
    ids: tuple[int, ...]
    hidden: Rows | None  # [R, E], side rows last; None at the first stage
    logit_rows: int  # rows at the end of the chain that the tail samples at, besides all side rows
    bidirectional: bool
    is_prompt: bool = False  # rows that were given: nobody waits for each of them
    sides: SideRows = NO_SIDES
    # These two are asked for a dozen times between a row's arrival and its step.
    row_count: int = field(init=False)
    is_decode: bool = field(
        init=False
    )  # rows that a person waits for, guessed ones too: no slice of a prompt

    def __post_init__(self) -> None:
        rows = len(self.ids) if self.sides is NO_SIDES else len(self.ids) + len(self.sides)
        object.__setattr__(self, "row_count", rows)
        is_decode = not self.is_prompt and not self.bidirectional and rows <= MAX_DECODE_ROWS
        object.__setattr__(self, "is_decode", is_decode)

    @property
    def is_divisible(self) -> bool:
        """Whether its rows may run in several steps. Logits are wanted of its last rows only."""
        return not self.bidirectional and self.logit_rows < len(self.ids) and not self.is_decode

    def split(self, count: int) -> tuple[Work, Work]:
        """The first `count` rows, and the rest: frames of the same seq, one after the other."""
        first, rest = self.hidden, self.hidden
        if self.hidden is not None:
            first, rest = self.hidden[:count], self.hidden[count:]
        head = replace(self, ids=self.ids[:count], hidden=first, logit_rows=0)
        return head, replace(self, base_row=self.base_row + count, ids=self.ids[count:], hidden=rest)

    def continues(self, work: Work) -> bool:
        """Whether it may run as one with `work`, which comes right before it in the same session."""
        return (
            self.is_decode
            and work.is_decode
            and self.turn == work.turn
            and self.base_row == work.base_row + len(work.ids)
        )

    def joined(self, before: Work) -> Work:
        """One frame of both, `before` first; side rows behind both chains."""
        hidden = None
        if self.hidden is not None and before.hidden is not None:
            old, new = len(before.ids), len(self.ids)
            parts = before.hidden[:old], self.hidden[:new], before.hidden[old:], self.hidden[new:]
            hidden = np.concatenate(parts)
        return replace(
            self,
            base_row=before.base_row,
            ids=before.ids + self.ids,
            hidden=hidden,
            logit_rows=before.logit_rows + self.logit_rows,
            sides=before.sides.followed_by(self.sides),
        )


# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True, eq=False)
class Received:
    """A message from the coordinator or from the device whose key the handshake proved.

    `rows` is the payload of FrameRows, shaped by this stage's own plan; None where it did not fit that shape.
    """

    source: str
    message: Message
    rows: Rows | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    lease: int
    numeric_class: str
    row_invariant: bool
    weight_bytes: int
    kv_capacity_tokens: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class LoadFailed:
    lease: int
    code: str
    reason: str
    hint: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class WorkFinished:
    """`rows` of an inner stage, or the vector of a pooling tail; `tokens` of a sampling tail, `finish` not set."""

    work: Work
    rows: Rows | None = None
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class RowsOpened:
    """The compute thread opened a session that has named pages: its first `rows` rows are here already."""

    lease: int
    session: SessionId
    rows: int


@dataclass(frozen=True, slots=True)
class SessionBroke:
    """The compute thread gave one session up (no room, say); the others go on."""

    lease: int
    session: SessionId
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class StageBroke:
    """The engine can't be trusted any more: every session of the lease is lost here."""

    lease: int
    code: str
    reason: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class ControlLost:
    """The link to the coordinator broke: it gives a plan up as soon as it loses a member, so the plan is over."""


Event = ControlLost | Received | Loaded | LoadFailed | RowsOpened | WorkFinished | SessionBroke | StageBroke

# ---------------------------------------------------------------- instructions


@dataclass(frozen=True, slots=True, eq=False)
class Send:
    to: str  # a device id, or COORDINATOR
    message: Message
    rows: Rows | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """Fetch and load what `order` names, dropping every session; answer with Loaded or LoadFailed."""

    order: LoadStage


@dataclass(frozen=True, slots=True)
class Retire:
    """Forget sessions and stop loading; weights stay, for the next plan."""

    lease: int


@dataclass(frozen=True, slots=True)
class Unload:
    """Forget sessions and weights of everything up to `lease`."""

    lease: int


@dataclass(frozen=True, slots=True)
class OpenRows:
    """Reserve KV; at a sampling tail, make a sampler too. Answer with RowsOpened where there are page names."""

    lease: int
    session: SessionId
    max_rows: int
    prompt_rows: int
    sampling: SamplingParams | None
    page_names: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class RunRows:
    work: Work


@dataclass(frozen=True, slots=True)
class CancelRows:
    """Take the session's queued work of turns below `turn` out, before the next step. What it holds stays.

    `known`: committed ids of positions `turn` and on. Work whose side rows go that way stays, as work of `turn`.
    """

    lease: int
    session: SessionId
    turn: int
    known: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class DropRows:
    """Take the session's queued work out and free its KV, before the next step.

    Pages from `first_page` on that hold exactly `ids` are kept for others under `page_names`.
    """

    lease: int
    session: SessionId
    first_page: int = 0
    page_names: tuple[bytes, ...] = ()
    ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Ignore:
    """Nothing was done, and why: for the debug log."""

    reason: str


Instruction = Send | Load | Retire | Unload | OpenRows | RunRows | CancelRows | DropRows | Ignore
