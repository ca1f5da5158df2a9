"""The drafter's side of a request as a pure state machine (docs/speculative.md).

In: committed ids, proposals that are ready, time, the link's ends. Out: frames for the link, orders for the drafter,
and when to look again. At most one proposal is asked for at a time; drafts condition on all ids in flight. What is
proposed and not likely enough to be right (`Choice.least_chance`) is held, not sent: it goes out when verdicts have
made it likelier, or is compared with what the target says and counts as judged, at no cost to anybody else.

    driver                          loop                                   driver
    begin(prompt) on the drafter -> start(now)
    committed frame arrived      -> committed(position, ids, now, finish) -> Rewind, Extend, Propose, SendDrafts …
    drafter.propose returned     -> proposed(ticket, proposal, …)         -> SendDrafts, Extend, Propose
    wake_at passed               -> passed(now)                           -> SendDrafts (again)
    load frame arrived           -> loaded(share, now)                    -> SendDrafts, Propose

Knows: positions, what is in flight, and which of it is settled. Does not know: clocks, threads, sockets, models.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from edge_runtime.errors import ProtocolError
from edge_runtime.speculative.controller import Choice, Controller
from edge_runtime.speculative.drafters.base import Proposal
from edge_runtime.speculative.estimates import Estimates, depth_bucket
from edge_runtime.speculative.round_trips import RoundTrips, Sent
from edge_runtime.speculative.stream_model import frame_size
from edge_runtime.speculative.wire import DraftFrame, chain_frame, tree_frame

LOOPS_BEFORE_RESEND = 1.5
UNMEASURED_LOOPS_BEFORE_RESEND = 6.0  # while the loop is only guessed from the target's own pace
LONGEST_RESEND_SECONDS = 30.0


# ---------------------------------------------------------------- actions, to be done in order


@dataclass(frozen=True, slots=True)
class SendDrafts:
    """Put this frame on the link. Where there is none, drop it: `resumed` makes another."""

    frame: DraftFrame


@dataclass(frozen=True, slots=True)
class Rewind:
    """Drafter.rewind(length)."""

    length: int


@dataclass(frozen=True, slots=True)
class Extend:
    """Drafter.extend(ids)."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Propose:
    """Drafter.propose(count, width), then `proposed(ticket, …)`. A newer ticket makes older ones worthless."""

    ticket: int
    count: int
    width: int


Action = SendDrafts | Rewind | Extend | Propose


@dataclass(slots=True)
class Counts:
    """Ids of main chains unless said otherwise."""

    drafted: int = 0
    accepted: int = 0
    wasted: int = 0  # sent, and then behind a miss or the miss itself
    misses: int = 0
    sides: int = 0  # side rows sent
    rescued: int = 0  # misses that a side row had right
    resent_frames: int = 0
    held: int = 0  # drafts that were made, not sent, and compared with what the target said


Beside = tuple[tuple[int, float], ...]  # ids that stand beside a draft, and the chance of each


@dataclass(frozen=True, slots=True)
class _Guess:
    id: int
    source: str
    score: float | None  # the drafter's own estimate that it is right,
    odds: float  # and what that says against its source's others
    depth: int  # drafts in flight before it when it was made
    beside: Beside = ()

    def with_sides(self, least_chance: float) -> _Guess:
        """Only those beside it that are as likely as this."""
        return replace(self, beside=tuple(side for side in self.beside if side[1] >= least_chance))


@dataclass(frozen=True, slots=True)
class _InFlight:
    guess: _Guess
    sent: Sent

    @property
    def id(self) -> int:
        return self.guess.id


@dataclass(frozen=True, slots=True)
class _Asked:
    ticket: int
    base: int  # position of its first id


class DraftLoop:
    """One request. Every method returns the actions that follow, in order."""

    def __init__(
        self,
        prompt_length: int,
        max_rows: int,
        vocab_size: int,
        controller: Controller,
        *,
        estimates: Estimates | None = None,
        stop_ids: Collection[int] = (),
    ) -> None:
        """`prompt_length`: given ids, position of the first id to come. `max_rows`: prompt and all that may follow."""
        self.length = prompt_length  # ids that are committed, prompt included
        self.turn = 0
        self.finish = ""
        self.counts = Counts()
        self.estimates = estimates or Estimates()
        self.estimates.begin()
        self._first = prompt_length
        self._last_row = max_rows - 2  # the id of the last position is never run
        self._vocab_size = vocab_size
        self._controller = controller
        self._stop_ids = frozenset(stop_ids)
        self._load = 0.0  # of the target, as it says
        self._window: deque[_InFlight] = deque()
        self._held: list[
            _Guess
        ] = []  # of positions right after the window: not sent, the drafter does not follow them
        self._tickets = 0
        self._asked: _Asked | None = None
        self._since: list[int] = []  # committed while a proposal was being made for their positions
        self._stuck = False  # the drafter had nothing to say about this sequence
        self._linked = False
        self._times = RoundTrips(self.estimates)
        self._resends = 0  # since the last id that was committed

    @property
    def in_flight(self) -> int:
        """Drafts sent and not judged yet."""
        return len(self._window)

    @property
    def wake_at(self) -> float | None:
        """When to call `passed`, in the driver's seconds; None: only when something happens.

        It goes by the age of the oldest draft. Where drafts were lost, the target's own ids go on and move the window
        along, and whatever is drafted beyond the gap comes too early for stage 1: it would be so for ever.
        """
        if not self._window or not self._linked or self.finish:
            return None
        loops = LOOPS_BEFORE_RESEND if self.estimates.is_loop_measured else UNMEASURED_LOOPS_BEFORE_RESEND
        wait = loops * self.estimates.slow_loop_seconds * 2.0**self._resends
        return self._window[0].sent.last_seconds + min(wait, LONGEST_RESEND_SECONDS)

    def start(self, now_seconds: float) -> list[Action]:
        """The link is up and the request admitted. Drafting begins with the first committed id."""
        self._linked = True
        return []

    def link_lost(self, now_seconds: float) -> list[Action]:
        self._linked = False
        return []

    def link_resumed(self, now_seconds: float) -> list[Action]:
        """Again connected, with new codecs; the far side sends what was committed since by itself."""
        self._linked = True
        return [*self._resend(now_seconds), *self._go_on(now_seconds)]

    def loaded(self, load: float, now_seconds: float) -> list[Action]:
        """What the target says of itself: 0, nobody else needs its rows, to 1, every wrong one slows somebody down."""
        self._load = load
        return self._go_on(now_seconds)

    # ------------------------------------------------------------ what was committed

    def committed(
        self, position: int, ids: Sequence[int], now_seconds: float, finish: str = ""
    ) -> list[Action]:
        """Ids of positions `position` and on; those known already are skipped.

        Raises ProtocolError where ids before `position` are missing, or for one outside the vocabulary.
        """
        if position > self.length:
            raise ProtocolError(
                f"ids from position {position} arrived, {self.length} is next", hint="reconnect, and resume"
            )
        if any(not 0 <= token < self._vocab_size for token in ids):
            raise ProtocolError(
                "a committed id lies outside the vocabulary", hint="use the target's tokenizer"
            )
        new = tuple(ids[self.length - position :])
        self.finish = finish or self.finish
        if not new:
            return self._go_on(now_seconds)
        actions = self._settle(new, now_seconds)
        self._stuck = False
        self._resends = 0
        return [*actions, *self._go_on(now_seconds)]

    def _settle(self, new: tuple[int, ...], now: float) -> list[Action]:
        right = self._count_right(new, now)
        self.length += len(new)
        rest = new[right:]
        if not rest:
            return []
        if not self._window:  # the target is ahead of the drafter
            self._compare_held(rest)
            if self._asked is not None:
                self._since.extend(rest)
            return [Extend(rest)]
        return self._miss(self.length - len(rest), rest)

    def _count_right(self, new: tuple[int, ...], now: float) -> int:
        """Takes drafts that were right out of the window."""
        right: list[_InFlight] = []
        for token in new:
            if not self._window or self._window[0].id != token:
                break
            draft = self._window.popleft()
            self._judge(draft.guess, True)
            right.append(draft)
        self._times.arrived([draft.sent for draft in right], len(new), now, is_more=bool(self._window))
        self.counts.accepted += len(right)
        return len(right)

    def _judge(self, guess: _Guess, accepted: bool) -> None:
        self.estimates.judged(guess.source, guess.depth, accepted, guess.score)

    def _compare_held(self, ids: tuple[int, ...]) -> None:
        """`ids` are the target's own, from the first held position on."""
        for token, guess in zip(ids, self._held, strict=False):
            self._judge(guess, guess.id == token)
            self.counts.held += 1
            if guess.id != token:
                break
        self._held.clear()

    def _miss(self, position: int, ids: tuple[int, ...]) -> list[Action]:
        """The draft at `position` was wrong; `ids` are right, from there on."""
        wrong = self._window[0].guess
        self._judge(wrong, False)
        is_rescued = any(token == ids[0] for token, _ in wrong.beside)
        if wrong.beside:
            self.estimates.rescued(is_rescued)
        self.counts.rescued += is_rescued
        self.counts.misses += 1
        self.counts.wasted += len(self._window)
        self.turn = position
        self._window.clear()
        self._held.clear()
        self._asked = None
        self._since.clear()
        self._times.missed(rescue_follows=is_rescued and len(ids) == 1)
        return [Rewind(position), Extend(ids)]

    # ------------------------------------------------------------ what is proposed

    def proposed(
        self, ticket: int, proposal: Proposal, began_seconds: float, ended_seconds: float
    ) -> list[Action]:
        """What the drafter answered to Propose(ticket), and when it was at it."""
        self.estimates.drafted(proposal.source, proposal.chain_length, ended_seconds - began_seconds)
        asked, self._asked = self._asked, None
        if asked is None or asked.ticket != ticket:
            self._asked = asked
            return []
        since, self._since = tuple(self._since), []
        chain = proposal.ids[: proposal.chain_length]
        if chain[: len(since)] != since:
            return self._go_on(ended_seconds)
        room = max(0, self._last_row + 1 - asked.base - len(since))
        rest = self._worth_sending(chain[len(since) :])[:room]
        self._stuck = not chain or (len(chain) > len(since) and not rest)
        if self._linked and not self.finish:
            scores = proposal.probabilities[len(since) :] or (None,) * len(rest)
            self._held = [
                self._guess(token, proposal.source, score, proposal.beside(len(since) + index))
                for index, (token, score) in enumerate(zip(rest, scores, strict=False))
            ]
        return self._go_on(ended_seconds)

    def _guess(self, token: int, source: str, score: float | None, beside: Beside) -> _Guess:
        beside = tuple((side, chance) for side, chance in beside if self._worth_sending((side,)))
        odds = self.estimates.odds(source, score)
        return _Guess(token, source, score, odds, len(self._window), beside)

    def _worth_sending(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Nothing follows a stop id, and the target has no other ids than its vocabulary's."""
        for index, token in enumerate(ids):
            if token in self._stop_ids or not 0 <= token < self._vocab_size:
                return ids[:index]
        return ids

    # ------------------------------------------------------------ what is sent

    def _go_on(self, now: float) -> list[Action]:
        """Send what is held and likely enough; then ask for more."""
        if self.finish or not self._linked or self.length == self._first:
            return []
        choice = self._controller.choose(self.estimates.measured(), self.length - self._first, self._load)
        return [*self._send(choice, now), *self._ask(choice)]

    def _send(self, choice: Choice, now: float) -> list[Action]:
        if not self._held:
            return []
        chances = self._chances()
        is_unlikely = [chance < choice.least_chance for chance in chances[1:]]
        likely = is_unlikely.index(True) if any(is_unlikely) else len(self._held)
        count = min(likely, max(0, choice.window - len(self._window)))
        if not count:
            return []
        base = self.length + len(self._window)
        held, self._held = self._held[:count], self._held[count:]
        sent = [
            guess.with_sides(choice.side_chance / max(before, 1e-9))
            for guess, before in zip(held, chances, strict=False)
        ]
        ids = tuple(guess.id for guess in sent)
        self._window.extend(_InFlight(guess, Sent(now, now)) for guess in sent)
        self.counts.drafted += count
        beside = [[token for token, _ in guess.beside] for guess in sent]
        self.counts.sides += sum(map(len, beside))
        return [SendDrafts(tree_frame(self.turn, base, ids, beside)), Extend(ids)]

    def _chances(self) -> list[float]:
        """That all in flight are right, and then each more of those held, too: one more than are held."""
        acceptance: dict[str, tuple[float, ...]] = {}
        chances, guesses = [1.0], [*(draft.guess for draft in self._window), *self._held]
        for guess in guesses:
            if guess.source not in acceptance:
                acceptance[guess.source] = self.estimates.acceptance(guess.source)
            right = min(1.0, acceptance[guess.source][depth_bucket(guess.depth)] * guess.odds)
            chances.append(chances[-1] * right)
        return chances[len(self._window) :]

    def _ask(self, choice: Choice) -> list[Action]:
        if self._asked or self._stuck or self._held or not choice.window:
            return []
        base = self.length + len(self._window)
        chunk = frame_size(choice.chunk, len(self._window))
        room = choice.window - len(self._window)
        count = min(chunk, self._last_row + 1 - base)
        if count < 1 or room < min(chunk, choice.window):
            return []
        self._tickets += 1
        self._asked = _Asked(self._tickets, base)
        return [Propose(self._tickets, count, choice.width)]

    # ------------------------------------------------------------ time

    def passed(self, now_seconds: float) -> list[Action]:
        """Sends the window again once its oldest draft is unanswered for 1.5 loops; in a row, each time twice that."""
        due = self.wake_at
        if due is None or now_seconds < due:
            return []
        self._resends += 1
        return self._resend(now_seconds)

    def _resend(self, now: float) -> list[Action]:
        if not self._window:
            return []
        self._window = deque(replace(draft, sent=draft.sent.again(now)) for draft in self._window)
        self.counts.resent_frames += 1
        return [SendDrafts(chain_frame(self.turn, self.length, tuple(draft.id for draft in self._window)))]
