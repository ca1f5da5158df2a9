"""How far ahead to draft, in what pieces, and which drafts are not worth sending: most committed tokens per second.

The target's rows and the link's bytes have a price, so that speed is not bought at any cost:

    utility = log(committed tokens per second) - (row price x wasted rows + byte price x bytes up) per committed token

Nothing at all (k = 0) is a choice like others; it brings what the target makes by itself. A loaded target says so
(`load`, 0 .. 1): rows then cost what they cost others, and a draft must be likely to be right to be sent at all
(SmartSpec's goodput, arXiv 2406.14066, with the chance of each row in the place of one length for all).

Knows: measured values, prices. Does not know: time, frames, links, or how anything was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log

from edge_runtime.speculative.estimates import Measured
from edge_runtime.speculative.stream_model import (
    Cycle,
    cycle,
    sending_seconds,
    survival,
    without_drafts,
)

CHUNKS = (1, 2, 3, 4, 6, 8)
CHUNKS_OF_WINDOW = 4  # at least: a window that is full must go on in small steps
WINDOWS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)
SLACK = 1.3  # windows a little larger than a loop holds: a verdict that is late must not stall the stream
NEVER = 2.0  # as a least chance: drafts are made and compared with what is committed, and none is sent
ROUNDING = 0.999  # of a least chance: what was computed in another order must not fall just below it

ID_BYTES = 2  # of frames on the device's link; the header beside them, and what a restart adds to it
HEAD_BYTES = 1
RESTART_BYTES = 2
SIDE_BYTES = 3

REVIEW_VERDICTS = 16  # a choice holds for so many verdicts,
REVIEW_IDS = 32  # or so many committed ids
PROBE_VERDICTS = 4
FIRST_BACKOFF_IDS = (
    16  # without drafts before the first look whether they would be right now; then twice as many
)
LONGEST_BACKOFF_IDS = 512


@dataclass(frozen=True, slots=True)
class Limits:
    max_window: int = 64  # drafts in flight
    max_width: int = 1  # guesses for a position: more make side rows
    max_chunk: int = 32


@dataclass(frozen=True, slots=True)
class Prices:
    """Shares of the speed, for each committed token. `loaded_row` is what a fully loaded target adds.

    `loaded_chance`: a draft that is less likely to be right is not sent to a fully loaded target.
    """

    row: float = 0.008
    byte: float = 0.0025
    loaded_row: float = 0.1
    loaded_chance: float = 0.88


DEFAULT_LIMITS = Limits()
DEFAULT_PRICES = Prices()


@dataclass(frozen=True, slots=True)
class Choice:
    """`window`: drafts in flight, 0 for none at all. `chunk`: ids of a frame. `width`: guesses per position.

    `least_chance`: of a draft and all in flight before it being right, for it to be sent; `side_chance`: likewise of a
    guess beside a draft.
    """

    window: int
    chunk: int
    width: int
    least_chance: float = 0.0
    side_chance: float = 0.0


NOTHING = Choice(0, 1, 1, NEVER)
PROBE = Choice(1, 1, 1, NEVER)


def mean_acceptance(measured: Measured, depth: int) -> float:
    """Of the first `depth` drafts, each weighted by the chance that it is judged at all."""
    weights = [survival(measured, index) for index in range(max(1, depth) + 1)]
    return sum(weights[1:]) / sum(weights[:-1])


def streamed_rate(measured: Measured, chunk: int, window: int) -> float:
    """Committed tokens per second of one session: the formula of the research note, which knows no floor.

    1 / (tau + (1 - a) (L + (c - 1) Td / 2)), tau = max(Td, s(c) / c, L / W), s(c): service of a frame of c rows.
    """
    service = measured.service_seconds + (chunk - 1) * measured.service_row_seconds
    tau = max(measured.draft_seconds, service / chunk, measured.loop_seconds / window)
    miss = 1 - mean_acceptance(measured, window)
    restart = measured.loop_seconds + (chunk - 1) * measured.draft_seconds / 2
    return 1 / (tau + miss * restart)


def utility(one: Cycle, load: float, prices: Prices) -> float:
    """Of natural logarithms, so that 0.01 is one per cent of speed."""
    wasted_rows = one.drafts - one.accepted
    is_any = min(1.0, one.drafts)
    up_bytes = ID_BYTES * one.drafts + HEAD_BYTES * one.frames + RESTART_BYTES * is_any
    row_price = prices.row + load * prices.loaded_row
    return log(one.rate) - (row_price * wasted_rows + prices.byte * up_bytes) / one.committed


def choose(
    measured: Measured, limits: Limits, *, load: float = 0.0, prices: Prices = DEFAULT_PRICES
) -> Choice:
    """The chunk and the window of the best utility, the window as a least chance: that of its last draft.

    The window that is returned fills the loop: drafts that are likelier than most may run further ahead.
    """

    def worth(chunk: int, window: int) -> float:
        return utility(cycle(measured, chunk, window), load, prices)

    filling = _filling(measured, 1, limits)
    windows = sorted({min(window, filling) for window in WINDOWS})
    window = max(windows, key=lambda w: (worth(1, w), -w))
    chunks = [c for c in CHUNKS if c <= min(limits.max_chunk, max(1, window // CHUNKS_OF_WINDOW))]
    chunk = max(chunks, key=lambda c: (worth(c, window), -c))
    is_known = (
        measured.verdicts >= PROBE_VERDICTS
    )  # before that drafts are tried, whatever is believed of them
    if is_known and worth(chunk, window) <= utility(without_drafts(measured), load, prices):
        return NOTHING
    least = max(_least_chance(measured, window), load * prices.loaded_chance)
    return Choice(_filling(measured, chunk, limits), chunk, limits.max_width, least, side_price(load, prices))


def side_price(load: float, prices: Prices) -> float:
    """A side row that is right with this chance pays for itself: it brings one id."""
    return prices.row + load * prices.loaded_row + prices.byte * SIDE_BYTES


def _least_chance(measured: Measured, window: int) -> float:
    """Of the last draft of the best window, and a quarter more: acceptance goes up and down between two choices.

    Windows that fill the loop anyway need none: it would only cut off what is sent when luck was bad.
    """
    if window * sending_seconds(measured) >= measured.loop_seconds:
        return 0.0
    return survival(measured, window + window // 4) * ROUNDING


def _filling(measured: Measured, chunk: int, limits: Limits) -> int:
    """The window that keeps the loop full."""
    ahead = ceil(SLACK * measured.loop_seconds / sending_seconds(measured))
    return min(limits.max_window, ahead + chunk)


class Controller:
    """What `draft_loop` asks. A choice holds for a few verdicts.

    Where it is nothing, a few drafts are made now and then that are not sent, only compared with what is committed:
    after 16 ids, 32, 64, … as long as it stays nothing.
    """

    def __init__(self, limits: Limits | None = None, prices: Prices | None = None) -> None:
        self.limits = limits or DEFAULT_LIMITS
        self.prices = prices or DEFAULT_PRICES
        self._choice: Choice | None = None
        self._chosen_for = (0, 0, 0.0)  # verdicts, committed ids, load
        self._backoff_ids = FIRST_BACKOFF_IDS
        self._quiet_since = 0  # committed ids
        self._probe_ends = 0  # verdicts; a probe goes on below it

    def choose(self, measured: Measured, committed_ids: int, load: float = 0.0) -> Choice:
        """`committed_ids`: of this request, so far. `load` of the target, 0 .. 1."""
        if self._choice is None or self._is_due(measured, committed_ids, load):
            self._review(measured, committed_ids, load)
        assert self._choice is not None
        if self._choice.window:
            return self._choice
        if measured.verdicts >= self._probe_ends and committed_ids - self._quiet_since >= self._backoff_ids:
            self._probe_ends = measured.verdicts + PROBE_VERDICTS
            self._quiet_since = committed_ids
            self._backoff_ids = min(2 * self._backoff_ids, LONGEST_BACKOFF_IDS)
        return PROBE if measured.verdicts < self._probe_ends else NOTHING

    def _is_due(self, measured: Measured, committed_ids: int, load: float) -> bool:
        verdicts, ids, before = self._chosen_for
        is_old = measured.verdicts - verdicts >= REVIEW_VERDICTS or committed_ids - ids >= REVIEW_IDS
        is_probed = verdicts < self._probe_ends <= measured.verdicts
        return is_old or is_probed or load != before

    def _review(self, measured: Measured, committed_ids: int, load: float) -> None:
        was_something = self._choice is None or self._choice.window > 0
        self._choice = choose(measured, self.limits, load=load, prices=self.prices)
        self._chosen_for = (measured.verdicts, committed_ids, load)
        if self._choice.window:
            self._backoff_ids = FIRST_BACKOFF_IDS
        elif was_something:
            self._quiet_since = committed_ids
