"""Drafts of one request: which are worth forwarding, and what became of them.

A drafter may be hostile, and a wrong draft costs a row on every stage. So rows are bought with credit that only right
guesses earn: whoever is always wrong ends at one row for many tokens, and nobody else slows down. On a loaded target a
right guess earns little more than itself, so that few rows are wasted there whatever a device does.

Knows: guesses by position, and credit. Does not know: links, stages, the wire.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from edge_runtime.errors import ProtocolError
from edge_runtime.protocol.messages import Draft
from edge_runtime.speculative.wire import MAX_DRAFT_IDS

MAX_AHEAD = 1024  # positions beyond the newest committed one
FIRST_CREDIT = 128.0  # rows
MOST_CREDIT = 1024.0
ACCEPTED_EARNS = 24.0  # rows: a window that is thrown away at every third guess still pays for itself
COMMITTED_EARNS = 0.125  # so that a drafter that was wrong for long may try again when the text gets easier
LOADED_CREDIT = 8.0  # the most, on a fully loaded target
LOADED_EARNS = 1.1, 0.02  # there, of an accepted and of a committed id
CUT_LOAD = 0.5  # up to which what there is no credit for is cut off a frame; beyond, all of it is refused


@dataclass(frozen=True, slots=True)
class DraftCounts:
    """Rows that were forwarded as drafts. `wasted` ones were not what the target said, or came to nothing."""

    drafted: int = 0
    accepted: int = 0
    wasted: int = 0

    def __add__(self, other: DraftCounts) -> DraftCounts:
        return DraftCounts(
            self.drafted + other.drafted, self.accepted + other.accepted, self.wasted + other.wasted
        )

    def __sub__(self, other: DraftCounts) -> DraftCounts:
        return DraftCounts(
            self.drafted - other.drafted, self.accepted - other.accepted, self.wasted - other.wasted
        )


def check_draft(draft: Draft, vocab_size: int) -> None:
    """Raises ProtocolError where it is none: ids of another vocabulary, parents that no tree has."""
    if not 0 < len(draft.ids) <= MAX_DRAFT_IDS or len(draft.parents) != len(draft.ids):
        raise ProtocolError(f"a draft has 1 to {MAX_DRAFT_IDS} ids, and a parent for each")
    wrong = next((each for each in draft.ids if not 0 <= each < vocab_size), None)
    if wrong is not None:
        raise ProtocolError(
            f"the draft has id {wrong}, and the model's vocabulary ends at {vocab_size - 1}",
            hint="the drafter must have the model's own tokenizer",
        )
    if draft.base_row < 1 or draft.turn < 0:
        raise ProtocolError(f"a draft can't begin at row {draft.base_row}")
    for index, parent in enumerate(draft.parents):
        if not draft.base_row - 1 <= parent < draft.base_row + index:
            raise ProtocolError("a draft's row continues a row that is not before it in the same frame")


def positions_of(base_row: int, parents: Sequence[int]) -> tuple[int, ...]:
    """The position each row guesses the id of: its parent's plus one."""
    found: list[int] = []
    for parent in parents:
        found.append(base_row if parent < base_row else found[parent - base_row] + 1)
    return tuple(found)


class DraftLedger:
    """`position`: the first that is not committed; `max_rows`: of the request."""

    def __init__(self, position: int, max_rows: int) -> None:
        self.counts = DraftCounts()
        self._position = position
        self._max_rows = max_rows
        self._credit = FIRST_CREDIT
        self._turn = 0  # position of the last miss seen here
        self._guesses: dict[int, dict[int, bool]] = {}  # position -> id -> on the main chain

    @property
    def credit_rows(self) -> float:
        return self._credit

    @property
    def turn(self) -> int:
        return self._turn

    def offer(self, draft: Draft, load: float = 0.0) -> Draft | None:
        """What of it to forward. What is not forwarded costs its sender nothing but time.

        Without credit for all of it the beginning of its chain goes on: one right guess there earns credit for many,
        and to refuse the whole would leave a device that was wrong for long at the target's own pace until it has
        credit for as large a frame as it happens to send. A loaded target forwards all or nothing: single rows would
        be half wasted there. `load` of the target, 0 .. 1.
        """
        if draft.base_row > self._position + MAX_AHEAD or draft.turn >= self._position:
            return None  # of a future that nobody can know yet
        new = self._new(draft)
        credit = int(min(self._credit, _between(MOST_CREDIT, LOADED_CREDIT, load)))
        if len(new) > credit:
            cut = self._beginning(draft, credit) if load <= CUT_LOAD else None
            if cut is None:
                return None
            draft, new = cut, self._new(cut)
        self._credit -= len(new)
        self.counts += DraftCounts(drafted=len(new))
        if draft.turn < self._turn:  # it was on its way when the miss came: stage 1 knows what to do with it
            self.counts += DraftCounts(wasted=len(new))
            return draft
        for position, identity, is_main in new:
            self._guesses.setdefault(position, {})[identity] = is_main
        return draft

    def _beginning(self, draft: Draft, credit: int) -> Draft | None:
        """Its chain as far as there is credit for new rows, without side rows; None where that is nothing."""
        length = 0
        for index, (parent, identity) in enumerate(zip(draft.parents, draft.ids, strict=True)):
            position = draft.base_row + index
            if parent != position - 1:
                break  # side rows follow
            is_known = identity in self._guesses.get(position, ())
            if self._position <= position < self._max_rows and not is_known:
                credit -= 1
            if credit < 0:
                break
            length = index + 1
        return replace(draft, parents=draft.parents[:length], ids=draft.ids[:length]) if length else None

    def _new(self, draft: Draft) -> list[tuple[int, int, bool]]:
        """(position, id, on the main chain) of rows that were not forwarded before."""
        found = []
        positions = positions_of(draft.base_row, draft.parents)
        for index, (position, identity) in enumerate(zip(positions, draft.ids, strict=True)):
            is_known = identity in self._guesses.get(position, ())
            if self._position <= position < self._max_rows and not is_known:
                found.append((position, identity, draft.parents[index] == draft.base_row - 1 + index))
        return found

    def committed(self, identity: int, load: float = 0.0) -> bool | None:
        """The id of the next position; whether it had been guessed, None where nobody tried.

        A main chain that misses takes everything beyond with it.
        """
        guesses = self._guesses.pop(self._position, {})
        self._position += 1
        self._earn(_between(COMMITTED_EARNS, LOADED_EARNS[1], load), load)
        accepted = identity in guesses
        self.counts += DraftCounts(accepted=int(accepted), wasted=len(guesses) - accepted)
        if accepted:
            self._earn(_between(ACCEPTED_EARNS, LOADED_EARNS[0], load), load)
        if any(guesses.values()) and not guesses.get(identity, False):
            self._turn = self._position - 1
            self.forget()
        return accepted if guesses else None

    def forget(self) -> None:
        """What is under way comes to nothing: a miss, another lease, the end."""
        wasted = sum(len(guesses) for guesses in self._guesses.values())
        self._guesses.clear()
        self.counts += DraftCounts(wasted=wasted)

    def _earn(self, rows: float, load: float) -> None:
        self._credit = min(_between(MOST_CREDIT, LOADED_CREDIT, load), self._credit + rows)


def _between(idle: float, loaded: float, load: float) -> float:
    return idle + (loaded - idle) * load
