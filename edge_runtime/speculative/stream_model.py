"""What a stream of drafts brings and costs, from one miss to the next: the expectation that the controller compares.

Position 0 is the one after the miss's correction. The target samples it by itself a floor after the miss; draft i is a
guess for position i, and its row gives the sample for position i + 1 a loop after it was sent:

    sent(0) = Td,  sent(i) = max(sent(i - 1) + tau, T(i - W))          tau = max(Td, s)
    T(0) = f,      T(i + 1) = min(T(i) + f, max(T(i), sent(i) + wait(i) + L))

All times are the device's, 0 when it learns of the miss. f: floor, L: loop, Td: time of a draft, W: window, s: what
one row more costs the slowest stage (stages run what waits as one frame, so the cost of a frame is no limit), wait(i):
for a frame of c ids to fill. The next miss lies at position n with chance S(n) (1 - a(n)), S(n) the product of the
acceptances a before it, and shows at T(n). With f = L (the delay lies in the ring) and a window that fills the loop it
is the streamed pipeline with a fenced restart.

Knows: measured values, a window, a chunk. Does not know: what ids or rows are worth.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.speculative.estimates import Measured, depth_bucket

LEAST_SURVIVAL = 4e-3  # what is less likely than that is not looked at
LONGEST_RUN = 192  # drafts


@dataclass(frozen=True, slots=True)
class Cycle:
    """Means of one stretch from miss to miss. `drafts`: ids sent, `accepted` of them right, in so many `frames`."""

    committed: float
    seconds: float
    drafts: float
    accepted: float
    frames: float

    @property
    def rate(self) -> float:
        """Committed tokens per second."""
        return self.committed / self.seconds


def without_drafts(measured: Measured) -> Cycle:
    return Cycle(1.0, measured.floor_seconds, 0.0, 0.0, 0.0)


def sending_seconds(measured: Measured) -> float:
    """tau: seconds between ids that are sent."""
    return max(measured.draft_seconds, measured.service_row_seconds)


def survival(measured: Measured, depth: int, window: int | None = None) -> float:
    """Chance that `depth` drafts in a row are right, none of them made with `window` drafts in flight or more."""
    chance = 1.0
    for index in range(depth):
        chance *= _acceptance(measured, index if window is None else min(index, window - 1))
    return chance


def frame_size(chunk: int, in_flight: int) -> int:
    """Ids of the next frame: the first after a miss goes alone, at once; what is unlikely to be judged may wait."""
    return min(chunk, max(1, in_flight))


def cycle(measured: Measured, chunk: int, window: int) -> Cycle:
    """`window` 1 and more: drafts in flight. Comparisons by `if`, where `min` and `max` take three times as long."""
    tau, draft, floor, loop = _times(measured)
    acceptance = [_acceptance(measured, depth) for depth in range(window)]
    sampled, sent, chance = [floor], draft, 1.0
    committed = seconds = drafts = accepted = 0.0
    for index in range(LONGEST_RUN):
        at = sampled[index]
        if index:
            sent += tau
            if index >= window and sampled[index - window] > sent:
                sent = sampled[index - window]
        right = acceptance[index] if index < window else acceptance[-1]
        if chance * right < LEAST_SURVIVAL:
            right = 0.0  # all that is left
        ends = chance * (1 - right)
        committed += ends * (index + 1)
        seconds += ends * at
        accepted += ends * index
        drafts += ends * (index + _ahead(at - sent, tau, window))
        chance *= right
        if not chance:
            break
        judged = sent + loop + (frame_size(chunk, index) - 1) * draft / 2
        next_at = judged if judged > at else at
        sampled.append(next_at if next_at < at + floor else at + floor)
    frames = drafts if chunk == 1 else min(drafts, 1 + max(0.0, drafts - 1) / chunk)
    rest = 1.0 - chance  # LONGEST_RUN may cut off runs that are nearly always right
    return Cycle(committed / rest, seconds / rest, drafts / rest, accepted / rest, frames / rest)


def _times(measured: Measured) -> tuple[float, float, float, float]:
    return sending_seconds(measured), measured.draft_seconds, measured.floor_seconds, measured.loop_seconds


def _ahead(since_seconds: float, tau: float, window: int) -> float:
    """Drafts sent when a miss shows, so long after the first of them that is wrong."""
    return min(float(window), 1 + since_seconds / tau) if since_seconds >= 0 else 0.0


def _acceptance(measured: Measured, depth: int) -> float:
    return measured.acceptance[min(depth_bucket(depth), len(measured.acceptance) - 1)]
