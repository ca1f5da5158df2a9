"""One generation: the ids that are certain, and where the text ends.

A server that generates one token at a time does not always say that the token ends the text (SGLang looks at the
length first). So a special token that is not known to end texts, or not to, is *doubtful*: the caller lets the server
decode on from before it, and tells `Ends` what came of it.

Knows: ids, ends, limits. Does not know: HTTP, drafts, text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from edge_runtime.errors import CapacityError

STOP, LENGTH = "stop", "length"


@dataclass(slots=True)
class Ends:
    """Ids that end a text at one server: `known` from the start, and learnt. `special`: those that might."""

    special: frozenset[int] = frozenset()
    known: set[int] = field(default_factory=set)
    harmless: set[int] = field(default_factory=set)

    def is_doubtful(self, token: int) -> bool:
        return token in self.special and token not in self.known and token not in self.harmless

    def learn(self, token: int, *, ends: bool) -> None:
        (self.known if ends else self.harmless).add(token)


class Progress:
    """`room`: ids that may still come."""

    def __init__(
        self,
        prompt_ids: Iterable[int],
        *,
        max_tokens: int,
        max_context: int | None,
        ends: Ends,
        ignore_end: bool,
    ) -> None:
        """Raises CapacityError where the prompt alone fills the context."""
        self.ids = list(prompt_ids)
        self.prompt_tokens = len(self.ids)
        self.finish = ""
        self.ignore_end = ignore_end
        self._ends = ends
        left = max_tokens if max_context is None else min(max_tokens, max_context - self.prompt_tokens)
        if left < 1:
            raise CapacityError(
                f"a prompt of {self.prompt_tokens} tokens leaves no room in a context of {max_context}",
                hint="shorten the prompt",
                code="context_length_exceeded",
            )
        self._last = self.prompt_tokens + left

    @property
    def room(self) -> int:
        return 0 if self.finish else self._last - len(self.ids)

    @property
    def generated(self) -> int:
        return len(self.ids) - self.prompt_tokens

    def is_doubtful(self, token: int) -> bool:
        return not self.ignore_end and self._ends.is_doubtful(token)

    def learn(self, token: int, *, ends: bool) -> None:
        self._ends.learn(token, ends=ends)

    def commit(self, token: int, *, ended: bool = False) -> None:
        """The next id. `ended`: the server says that the text ends with it."""
        self.ids.append(token)
        if not self.ignore_end and (ended or token in self._ends.known):
            self.finish = STOP
        elif len(self.ids) >= self._last:
            self.finish = LENGTH

    def useful(self, drafts: Collection[int]) -> int:
        """How many of `drafts` to send: up to the first that may end the text, since nothing follows that one."""
        for count, token in enumerate(drafts, 1):
            if not self.ignore_end and (token in self._ends.known or self._ends.is_doubtful(token)):
                return count
        return len(drafts)
