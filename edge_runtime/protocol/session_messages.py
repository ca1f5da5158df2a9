"""What is said while a session runs, ids in, rows between stages, ids out: part of the closed table in `messages.py`.

Knows: what is said. Does not know: how it travels, or what a stage does about it.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.core import SamplingParams, Token

PAGE_NAME_BYTES = 16
NOBODY_ASKS = -1  # in place of `held_rows`: stage 1 begins at row 0 and waits for no answer


@dataclass(frozen=True, slots=True)
class OpenSession:
    """Coordinator -> stage 1, then stage -> next stage ahead of the first frame, so that it can't be overtaken.

    Rows below `forced_rows` are given (prompt and journalled ids); the tail samples at row `forced_rows - 1` and on.
    `page_names` are what the leading full pages of these rows are called, PAGE_NAME_BYTES each (docs/prefix_cache.md);
    `held_rows` is how many of the rows the stages so far hold already (from the coordinator: how many they may reuse),
    or NOBODY_ASKS where stage 1 begins at row 0 without waiting for an answer (RowsHeld).
    """

    session: int
    lease: int
    forced_rows: int
    prompt_rows: int  # of the forced ones; penalties treat ids after it as generated
    max_rows: int  # prompt and everything that may be generated: reserve KV for it
    stop_ids: tuple[int, ...]
    sampling: SamplingParams
    tail: str  # "sampler" or "pooler"
    page_names: bytes = b""
    held_rows: int = NOBODY_ASKS


@dataclass(frozen=True, slots=True)
class Feed:
    """Coordinator -> stage 1: ids of rows base_row, base_row + 1, ... (a prompt, or journalled ids to re-feed)."""

    session: int
    lease: int
    base_row: int
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FrameRows:
    """Stage -> next stage. Payload: rows [len(ids), hidden] in the plan's wire format. The wire's hot path.

    A stage may pass a frame on in pieces: of the same `seq`, each from the row where the one before ended.

    `parents[i]` is the row that row `base_row + i` continues; a chain names the row before. Of guessed rows, side rows
    may follow the chain: run once, never held (docs/speculative.md); `ids` and rows have them last. A frame that
    continues a row below those a stage holds drops the rows after it: committing is choosing a parent. `seq` is issued
    by stage 1 alone, `lease` by the coordinator alone, `turn` is the position of the last wrong guess; older ones are
    dropped.
    """

    session: int
    lease: int
    turn: int
    seq: int
    base_row: int
    parents: tuple[int, ...]
    ids: tuple[int, ...]
    bidirectional: bool


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tail -> coordinator (journal, stream) and tail -> stage 1 (the ring turns on)."""

    session: int
    lease: int
    turn: int
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class StepRows:
    """Stage -> next stage: what one step made, a frame for each session. Payload: their rows, one after the other.

    It says what its frames would say one by one; together they cost one list, and start one step.
    """

    frames: tuple[FrameRows, ...]


@dataclass(frozen=True, slots=True)
class StepTokens:
    """Tail -> coordinator and tail -> stage 1: the ids of one step, of several sessions, as `StepRows`."""

    sessions: tuple[Tokens, ...]


@dataclass(frozen=True, slots=True)
class RowsHeld:
    """Tail -> stage 1 (the way goes on) and coordinator (it goes on at all): every stage holds the rows below `rows`.

    `reused`: before any row is run, where stage 1 found rows of another session: it begins there. Later for prompt rows
    that have come through: stage 1 sends no more than a window beyond them; the coordinator hears of it now and then.
    """

    session: int
    lease: int
    rows: int
    reused: bool


@dataclass(frozen=True, slots=True)
class Draft:
    """Whoever drafts -> coordinator -> stage 1: guessed ids for positions `base_row` and on (docs/speculative.md).

    `turn` is the position of the last guess the sender knows to be wrong, 0 for none. `parents` as in FrameRows: the
    main chain first, then side rows.
    """

    session: int
    lease: int
    turn: int
    base_row: int
    parents: tuple[int, ...]
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fence:
    """Tail -> every other stage: rows of turns below `turn` are dead, and need not run any more."""

    session: int
    lease: int
    turn: int


@dataclass(frozen=True, slots=True)
class Pooled:
    """Pooling tail -> coordinator. Payload: float32 [hidden]."""

    session: int
    lease: int


@dataclass(frozen=True, slots=True)
class Gap:
    """A stage got a row it can't place: it holds rows below `wanted_row`. The coordinator re-feeds."""

    session: int
    lease: int
    wanted_row: int


@dataclass(frozen=True, slots=True)
class SessionFailed:
    session: int
    lease: int
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class CloseSession:
    """Coordinator -> every stage: free the session's KV now. Unknown sessions are ignored.

    `page_names` continue those of OpenSession: pages that hold exactly the rows of `ids` (PAGE_TOKENS to a name) are
    kept under them for other sessions.
    """

    session: int
    lease: int
    page_names: bytes = b""
    ids: tuple[int, ...] = ()
