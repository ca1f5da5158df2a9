"""The binary frames of the device's link: drafts up, committed ids down, each as a difference to the one before.

    draft frame       head, [turn + base], ids, [side rows]         head: 1 byte
      head            bit 7 restart, bit 6 side rows, bits 5..0 number of chain ids - 1 (63: - 64 follows as varint)
      turn + base     only with restart: varint turn - last turn, varint base_row - turn; else turn is the last one and
                      base_row is where the last frame's main chain ended
      ids             little-endian, 2 bytes each, 3 where the vocabulary has more than 65 536 ids
      side rows       varint count, then for each: varint parent - (base_row - 1), and its id
    committed frame   head, [position], ids                         head: 1 byte
      head            bit 7 position follows, bits 6..5 finish, bits 4..0 number of ids (31: - 31 follows as varint)
      position        only where it is not one after the last id: varint, absolute
    load frame        a committed frame that says nothing (0), and the target's load: 1 byte, in 255ths

A run of guesses costs one byte a frame over its ids, the first frame after a miss three. Both ends of a WebSocket keep
the same small state; a new connection begins with new codecs, and so with a frame that says everything (`restart`).

Knows: frames as values, their bytes, and the last frame of its direction. Does not know: sockets, sessions, verdicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edge_runtime.errors import ProtocolError

MAX_DRAFT_IDS = 512  # of one frame: more than any window; a flood is refused before it is built
MAX_COMMITTED_IDS = 1 << 16  # of one frame: all that was missed while a link was broken
FINISHES = ("", "stop", "length", "cancelled")

_TWO_BYTE_VOCABULARY = 1 << 16
_VARINT_BYTES = 5
_RESTART, _SIDES, _CHAIN_FIELD = 0x80, 0x40, 0x3F
_POSITION, _FINISH_SHIFT, _COUNT_FIELD = 0x80, 5, 0x1F
_LOAD, _LOADS = 0, 255


@dataclass(frozen=True, slots=True)
class DraftFrame:
    """Guesses for positions `base_row` and on, as in the message Draft: the main chain first, then side rows.

    `parents[i]`: the row that row `base_row + i` continues. `turn`: position of the last miss the sender knows, or 0.
    """

    turn: int
    base_row: int
    ids: tuple[int, ...]
    parents: tuple[int, ...]

    @property
    def chain_length(self) -> int:
        first = self.base_row - 1
        return next((i for i, parent in enumerate(self.parents) if parent != first + i), len(self.parents))


@dataclass(frozen=True, slots=True)
class CommittedFrame:
    """Committed ids of positions `position` and on. `finish` is one of FINISHES; "" while the request goes on.

    `load`: of the target, 0 .. 1, in a frame that has nothing else; None in all others.
    """

    position: int
    ids: tuple[int, ...]
    finish: str = ""
    load: float | None = None


def chain_frame(turn: int, base_row: int, ids: tuple[int, ...]) -> DraftFrame:
    """A frame without side rows."""
    return DraftFrame(turn, base_row, ids, tuple(range(base_row - 1, base_row - 1 + len(ids))))


def tree_frame(turn: int, base_row: int, ids: tuple[int, ...], beside: Sequence[Sequence[int]]) -> DraftFrame:
    """A frame with side rows: `beside[i]` are other guesses for the position of ids[i]."""
    chain = chain_frame(turn, base_row, ids)
    sides = [(base_row - 1 + index, token) for index, tokens in enumerate(beside) for token in tokens]
    return DraftFrame(
        turn,
        base_row,
        ids + tuple(token for _, token in sides),
        chain.parents + tuple(parent for parent, _ in sides),
    )


class DraftEncoder:
    """`encode` frames in the order in which they are sent. One per connection."""

    def __init__(self, vocab_size: int) -> None:
        self._id_bytes = id_bytes(vocab_size)
        self._turn = 0
        self._end: int | None = None  # where the last main chain ended; None: nothing was sent

    def encode(self, frame: DraftFrame) -> bytes:
        """Raises ValueError for a frame that could not be decoded: no ids, a turn that sinks, parents out of order."""
        chain = frame.chain_length
        sides = list(zip(frame.parents[chain:], frame.ids[chain:], strict=True))
        if not chain or not self._turn <= frame.turn <= frame.base_row:
            raise ValueError(f"a draft frame needs a main chain and a turn from {self._turn} to its base row")
        restart = frame.turn != self._turn or frame.base_row != self._end
        head = min(chain - 1, _CHAIN_FIELD) | (_RESTART if restart else 0) | (_SIDES if sides else 0)
        out = bytearray((head,))
        if chain - 1 >= _CHAIN_FIELD:
            out += _varint(chain - 1 - _CHAIN_FIELD)
        if restart:
            out += _varint(frame.turn - self._turn) + _varint(frame.base_row - frame.turn)
        out += _ids(frame.ids[:chain], self._id_bytes)
        if sides:
            out += _varint(len(sides))
        for parent, token in sides:
            out += _varint(parent - (frame.base_row - 1)) + _ids((token,), self._id_bytes)
        self._turn, self._end = frame.turn, frame.base_row + chain
        return bytes(out)


class DraftDecoder:
    """The other end of DraftEncoder. Whatever arrives is a frame that is well formed, or a ProtocolError."""

    def __init__(self, vocab_size: int, max_rows: int) -> None:
        """Ids at or above `vocab_size` and rows at or above `max_rows` are refused."""
        self._vocab_size = vocab_size
        self._max_rows = max_rows
        self._turn = 0
        self._end: int | None = None

    def decode(self, data: bytes) -> DraftFrame:
        """Raises ProtocolError; the state is then as before."""
        read = _Reader(data, self._vocab_size)
        head = read.byte()
        chain = read.count(head & _CHAIN_FIELD, _CHAIN_FIELD) + 1
        turn, base_row = self._turn, self._end
        if head & _RESTART:
            turn += read.varint()
            base_row = turn + read.varint()
        if base_row is None:
            raise _refused("a draft frame continues one that was never sent")
        if not 1 <= base_row <= self._max_rows - chain or chain > MAX_DRAFT_IDS:
            raise _refused(f"{chain} drafts at row {base_row} do not fit a session of {self._max_rows} rows")
        ids = read.ids(chain)
        parents = tuple(range(base_row - 1, base_row - 1 + chain))
        if head & _SIDES:
            ids, parents = self._side_rows(read, base_row, ids, parents)
        read.end()
        self._turn, self._end = turn, base_row + chain
        return DraftFrame(turn, base_row, ids, parents)

    def _side_rows(
        self, read: _Reader, base_row: int, ids: tuple[int, ...], parents: tuple[int, ...]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        count = read.varint()
        if not 1 <= count <= MAX_DRAFT_IDS - len(ids):
            raise _refused(f"a draft frame with {count} side rows")
        for _ in range(count):
            parent = base_row - 1 + read.varint()
            if not base_row - 1 <= parent < base_row + len(ids):
                raise _refused("a side row continues a row that is not before it in its frame")
            if len(parents) == parent - (base_row - 1) == _chain(base_row, parents):
                raise _refused("a side row that continues the main chain belongs to it")
            ids, parents = (*ids, *read.ids(1)), (*parents, parent)
        return ids, parents


class CommittedEncoder:
    """`encode` frames in the order in which they are sent. One per connection."""

    def __init__(self, vocab_size: int) -> None:
        self._id_bytes = id_bytes(vocab_size)
        self._next: int | None = None  # position that need not be said

    def encode(self, frame: CommittedFrame) -> bytes:
        if frame.load is not None:
            return bytes((_LOAD, round(_LOADS * frame.load)))
        count = len(frame.ids)
        head = min(count, _COUNT_FIELD) | FINISHES.index(frame.finish) << _FINISH_SHIFT
        says_position = frame.position != self._next or head == _LOAD
        out = bytearray((head | (_POSITION if says_position else 0),))
        if count >= _COUNT_FIELD:
            out += _varint(count - _COUNT_FIELD)
        if says_position:
            out += _varint(frame.position)
        out += _ids(frame.ids, self._id_bytes)
        self._next = frame.position + count
        return bytes(out)


class CommittedDecoder:
    """The other end of CommittedEncoder."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._next: int | None = None

    def decode(self, data: bytes) -> CommittedFrame:
        """Raises ProtocolError; the state is then as before."""
        read = _Reader(data, self._vocab_size)
        head = read.byte()
        if head == _LOAD:
            load = read.byte() / _LOADS
            read.end()
            return CommittedFrame(self._next or 0, (), load=load)
        count = read.count(head & _COUNT_FIELD, _COUNT_FIELD)
        position = read.varint() if head & _POSITION else self._next
        if position is None:
            raise _refused("committed ids without a position")
        if count > MAX_COMMITTED_IDS:
            raise _refused(f"{count} committed ids in one frame")
        ids = read.ids(count)
        read.end()
        self._next = position + count
        return CommittedFrame(position, ids, FINISHES[head >> _FINISH_SHIFT & 3])


def id_bytes(vocab_size: int) -> int:
    """Bytes of one id on the link."""
    return 2 if vocab_size <= _TWO_BYTE_VOCABULARY else 3


def _chain(base_row: int, parents: tuple[int, ...]) -> int:
    return DraftFrame(0, base_row, (), parents).chain_length


def _varint(value: int) -> bytes:
    """Seven bits a byte, the low ones first; the high bit says that more follow."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _ids(ids: tuple[int, ...], width: int) -> bytes:
    return b"".join(token.to_bytes(width, "little") for token in ids)


def _refused(reason: str) -> ProtocolError:
    return ProtocolError(f"a frame on a drafting link is malformed: {reason}", hint="reconnect, and resume")


class _Reader:
    """What is left of a received frame."""

    def __init__(self, data: bytes, vocab_size: int) -> None:
        self._data = data
        self._at = 0
        self._vocab_size = vocab_size

    def byte(self) -> int:
        if self._at >= len(self._data):
            raise _refused("it ends too early")
        self._at += 1
        return self._data[self._at - 1]

    def varint(self) -> int:
        value = 0
        for index in range(_VARINT_BYTES):
            byte = self.byte()
            value |= (byte & 0x7F) << 7 * index
            if byte < 0x80:
                return value
        raise _refused("a number has too many bytes")

    def count(self, short: int, escape: int) -> int:
        return escape + self.varint() if short == escape else short

    def ids(self, count: int) -> tuple[int, ...]:
        width = id_bytes(self._vocab_size)
        chunk = self._data[self._at : self._at + count * width]
        if len(chunk) < count * width:
            raise _refused("ids are missing")
        self._at += len(chunk)
        ids = tuple(int.from_bytes(chunk[at : at + width], "little") for at in range(0, len(chunk), width))
        if ids and max(ids) >= self._vocab_size:
            raise _refused("an id lies outside the vocabulary")
        return ids

    def end(self) -> None:
        if self._at != len(self._data):
            raise _refused("bytes are left over")
