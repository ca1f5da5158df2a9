"""The next message of a session that decodes, known before it comes, and what this stage will answer.

While nothing is guessed, every round of the ring looks like the one before: the next message is known but for its id
(at the tail even that: it was sampled there) and its row, and so is this stage's own. What comes is compared with what
is expected byte by byte, as TCP's header prediction does (Jacobson 1990); whatever differs goes the ordinary way, which
stays the only one that says what is right (`pipeline_state`).

Knows: one stage's rules and one session, the frames' bytes. Does not know: links, queues, engines, clocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edge_runtime.agent.pipeline_state import PipelineState
from edge_runtime.agent.session import Session, finish_of
from edge_runtime.core import SessionId, Token
from edge_runtime.protocol import codec
from edge_runtime.protocol.messages import FrameRows, Message, OpenSession, Tokens

MAX_ID_BYTES = 5  # of an id that is written as msgpack does
_IDS = ((b"\xcc", 1), (b"\xcd", 2), (b"\xce", 4))  # unsigned, by size


def packed_id(token_id: int) -> bytes:
    """0 to 2**32 - 1 as msgpack writes it, without a packer and its buffer."""
    if token_id < 1 << 7:
        return token_id.to_bytes(1, "big")
    for kind, size in _IDS:
        if token_id < 1 << 8 * size:
            return kind + token_id.to_bytes(size, "big")
    raise ValueError(f"{token_id} is no token id")


def read_id(packed: bytes) -> int | None:
    """What `packed_id` wrote; None for anything else, also for a number that is written longer than it has to be."""
    if len(packed) > MAX_ID_BYTES:
        return None
    found = packed[0] if len(packed) == 1 else int.from_bytes(packed[1:], "big")
    return found if packed_id(found) == packed else None


@dataclass(frozen=True, slots=True)
class MessageWithHole:
    """The bytes of a message around the one id in it."""

    before: bytes
    after: bytes

    @classmethod
    def between(cls, zero: Message, one: Message) -> MessageWithHole:
        """Two messages that differ in that id alone: it is 0 in the first and 1 in the second, a byte in both."""
        first, second = codec.encode_message(zero), codec.encode_message(one)
        differing = [at for at, (a, b) in enumerate(zip(first, second, strict=True)) if a != b]
        (at,) = differing
        return cls(first[:at], first[at + 1 :])

    def filled(self, token_id: int) -> bytes:
        return self.before + packed_id(token_id) + self.after

    def id_in(self, frame: bytes) -> int | None:
        """The id of such a message; None for any other one, also for one that writes its id in another way."""
        start, end = len(self.before), len(frame) - len(self.after)
        if not start < end <= start + MAX_ID_BYTES or not frame.startswith(self.before):
            return None
        if not frame.endswith(self.after):
            return None
        return read_id(frame[start:end])


@dataclass(frozen=True, slots=True)
class PredictedRow:
    """One row of one session. `version`: of the state it was derived from; in any other it means nothing."""

    version: int
    lease: int
    order: OpenSession
    base_row: int
    source: str  # the device it comes from
    arriving: MessageWithHole | bytes  # bytes: its id is known, too
    known_id: int  # where `arriving` is bytes
    has_hidden: bool  # a row comes along
    vocab_size: int
    to: str  # the device that gets the answer
    leaving: MessageWithHole  # at the tail around the sampled id, elsewhere around the one that came
    samples: bool

    @property
    def session(self) -> SessionId:
        return SessionId(self.order.session)

    def id_in(self, frames: Sequence[bytes | memoryview]) -> int | None:
        """The id of the row that came. None: this is not what was expected."""
        if len(frames) != 1 + self.has_hidden:
            return None
        if isinstance(self.arriving, bytes):
            return self.known_id if frames[0] == self.arriving else None
        token_id = self.arriving.id_in(bytes(frames[0]))
        return token_id if token_id is not None and token_id < self.vocab_size else None

    def id_of(self, hole: bytes) -> int | None:
        """The id, from the bytes in place of it; there are none where it is known. None: it is no id."""
        if isinstance(self.arriving, bytes):
            return None if hole else self.known_id
        token_id = read_id(hole)
        return token_id if token_id is not None and token_id < self.vocab_size else None

    def answer(self, token_id: int, sampled: Sequence[Token]) -> int | None:
        """The id in the message to send. None: it is another one than was foreseen."""
        if not self.samples:
            return token_id
        if len(sampled) != 1:
            return None
        token = sampled[0]
        is_plain = token.logprob is None and token.position == self.base_row + 1
        return token.id if is_plain and not finish_of(self.order, token) else None


def predicted_row(state: PipelineState, session_id: SessionId) -> PredictedRow | None:
    """The next row of the session, where no other one decodes. None: none is due, or it can't be foreseen."""
    session, order, loaded = state.sessions.get(session_id), state.order, state.loaded
    if session is None or order is None or loaded is None or (state.is_first and state.is_tail):
        return None
    row, here = session.rows, order.stage
    is_plain = not session.halted and not session.is_bidirectional and session.order.tail == "sampler"
    if not is_plain or row < session.order.forced_rows or row + 1 >= session.order.max_rows:
        return None
    arriving: MessageWithHole | bytes
    leaving, known_id = _frame(session, order.lease), 0
    if state.is_first:
        if session.chain.next_position != row or session.held_drafts or state.has_prompts:
            return None
        arriving, source, to = _tokens(session, order.lease, row), order.devices[-1], order.devices[1]
    elif state.is_tail:
        if session.chain.next_position != row + 1:
            return None
        (known_id,) = session.chain.sure(row)
        arriving, leaving = leaving.filled(known_id), _tokens(session, order.lease, row + 1)
        source, to = order.devices[here - 1], order.devices[0]
    else:
        arriving, source, to = leaving, order.devices[here - 1], order.devices[here + 1]
    return PredictedRow(
        version=state.version,
        lease=order.lease,
        order=session.order,
        base_row=row,
        source=source,
        arriving=arriving,
        known_id=known_id,
        has_hidden=not state.is_first,
        vocab_size=loaded.vocab_size,
        to=to,
        leaving=leaving,
        samples=state.is_tail,
    )


def _frame(session: Session, lease: int) -> MessageWithHole:
    """The session's next row, as it comes and goes on."""

    def frame(token_id: int) -> FrameRows:
        where = session.id, lease, session.turn, session.seq + 1, session.rows
        return FrameRows(*where, parents=(session.rows - 1,), ids=(token_id,), bidirectional=False)

    return MessageWithHole.between(frame(0), frame(1))


def _tokens(session: Session, lease: int, position: int) -> MessageWithHole:
    """One id that is neither the last nor has more to say."""
    first, second = (Tokens(session.id, lease, session.turn, (Token(position, each),)) for each in (0, 1))
    return MessageWithHole.between(first, second)
