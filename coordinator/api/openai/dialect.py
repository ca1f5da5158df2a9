"""What differs between chat and completions when they answer.

Knows: the interface. The two dialects are in `chat.py` and `completions.py`, the flow they share in `answer.py`.
"""

from __future__ import annotations

from typing import Protocol

from coordinator.api.openai.choices import Choice
from coordinator.service import TokenEvent

Json = dict[str, object]


class Dialect(Protocol):
    """Renders choices. `piece` sees every event of a choice in order, just before the choice absorbs it."""

    whole_object: str  # "object" of a whole answer
    chunk_object: str  # and of a chunk

    def opening(self, choice: Choice) -> Json | None:
        """What a stream says of a choice before its first token."""
        ...

    def piece(self, choice: Choice, event: TokenEvent) -> Json | None:
        """The choice entry of a chunk, without a finish reason; None where the event says nothing to the reader."""
        ...

    def closing(self, choice: Choice) -> Json:
        """The last chunk's entry: nothing but the finish reason."""
        ...

    def whole(self, choice: Choice) -> Json:
        """The entry of a whole answer."""
        ...

    def extra(self, choices: list[Choice]) -> Json:
        """Fields of ours at the top of a whole answer or of the opening chunk."""
        ...
