"""The drafting device: the real loop and codecs, a drafter that takes virtual time.

Knows: its loop's actions, its drafter's seconds per id. Does not know: the target, links' delays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.simulator.clock import Clock
from edge_runtime.core import SamplingParams
from edge_runtime.speculative.draft_loop import Action, DraftLoop, Extend, Propose, Rewind, SendDrafts
from edge_runtime.speculative.drafters.base import Drafter, Proposal
from edge_runtime.speculative.wire import CommittedDecoder, DraftEncoder


class DraftingDevice:
    """A proposal that was begun is finished, whatever happens meanwhile, as on a thread of its own."""

    def __init__(
        self,
        clock: Clock,
        loop: DraftLoop,
        drafter: Drafter,
        prompt: Sequence[int],
        sampling: SamplingParams,
        draft_seconds: float,
        send: Callable[[bytes], None],
        vocab_size: int,
    ) -> None:
        self.loop = loop
        self.sent_bytes = 0
        self._clock = clock
        self._drafter = drafter
        self._draft_seconds = draft_seconds
        self._send = send
        self._vocab_size = vocab_size
        self._waiting: Propose | None = None
        self._is_drafting = False
        self._woken_at: float | None = None
        self._drafter.begin(prompt, sampling)
        self.connect()

    def connect(self) -> None:
        self._encoder, self._decoder = DraftEncoder(self._vocab_size), CommittedDecoder(self._vocab_size)

    def start(self) -> None:
        self._do(self.loop.start(self._clock.now_seconds))

    def lost(self) -> None:
        self._do(self.loop.link_lost(self._clock.now_seconds))

    def resumed(self) -> None:
        self.connect()
        self._do(self.loop.link_resumed(self._clock.now_seconds))

    def received(self, data: bytes) -> None:
        frame = self._decoder.decode(data)
        if frame.load is not None:
            self._do(self.loop.loaded(frame.load, self._clock.now_seconds))
            return
        self._do(self.loop.committed(frame.position, frame.ids, self._clock.now_seconds, frame.finish))

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case SendDrafts(frame):
                    data = self._encoder.encode(frame)
                    self.sent_bytes += len(data)
                    self._send(data)
                case Rewind(length):
                    self._drafter.rewind(length)
                case Extend(ids):
                    self._drafter.extend(ids)
                case Propose():
                    self._waiting = action
        self._draft()
        self._sleep()

    def _draft(self) -> None:
        if self._is_drafting or self._waiting is None:
            return
        asked, self._waiting = self._waiting, None
        self._is_drafting = True
        proposal = self._drafter.propose(asked.count, asked.width)
        began = self._clock.now_seconds
        seconds = self._draft_seconds * max(1, proposal.chain_length)
        self._clock.after(seconds, lambda: self._drafted(asked.ticket, proposal, began))

    def _drafted(self, ticket: int, proposal: Proposal, began: float) -> None:
        self._is_drafting = False
        self._do(self.loop.proposed(ticket, proposal, began, self._clock.now_seconds))

    def _sleep(self) -> None:
        due = self.loop.wake_at
        if due is None or due == self._woken_at:
            return
        self._woken_at = due
        self._clock.after(max(0.0, due - self._clock.now_seconds), self._wake)

    def _wake(self) -> None:
        self._woken_at = None
        self._do(self.loop.passed(self._clock.now_seconds))
