"""Whose prompt goes on when there is room for another chunk: in turns whoever has least left, and whoever came first.

Were all to share alike, a burst of prompts would end all at once, late: those with least left first means that most
wait least, and every other turn for the one that came first means that none waits for ever, however many short ones
come. Knows: sessions and their order. Does not know: rows, chunks, how much room there is.
"""

from __future__ import annotations

from collections.abc import Callable

from edge_runtime.core import SessionId


class PromptTurns:
    def __init__(self) -> None:
        self._waiting: dict[SessionId, None] = {}  # in the order they came
        self._is_turn_of_first = True

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, session: SessionId) -> None:
        """One that is there already keeps its place."""
        self._waiting.setdefault(session, None)

    def discard(self, session: SessionId) -> None:
        self._waiting.pop(session, None)

    def clear(self) -> None:
        self._waiting.clear()

    def peek(self, rows_left: Callable[[SessionId], int]) -> SessionId:
        """Whose turn it is; somebody must be there."""
        if self._is_turn_of_first:
            return next(iter(self._waiting))
        return min(self._waiting, key=rows_left)

    def took(self) -> None:
        """A chunk was issued."""
        self._is_turn_of_first = not self._is_turn_of_first
