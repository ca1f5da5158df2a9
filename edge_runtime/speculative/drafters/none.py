"""No drafts at all: the target decodes by itself. What "off" is where a drafter is expected.

Knows: nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_runtime.core import SamplingParams
from edge_runtime.speculative.drafters.base import Proposal, no_proposal


class NoDrafter:
    source = "none"
    memory_bytes = 0

    def begin(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> None:
        pass

    def extend(self, ids: Sequence[int]) -> None:
        pass

    def rewind(self, length: int) -> None:
        pass

    def propose(self, count: int, width: int = 1) -> Proposal:
        return no_proposal(self.source)

    def end(self, *, learn: bool = True) -> None:
        pass

    def close(self) -> None:
        pass
