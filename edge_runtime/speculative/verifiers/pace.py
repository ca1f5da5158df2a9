"""How many drafts to send with the next request, or none: then the server's own stream is read.

A request of k drafts takes T(k) seconds (a straight line through what was measured) and brings

    1 + E(k) ids,   E(k) = sum over i <= k of the product of the chances of the first i drafts.

The stream brings one id every t seconds, after S seconds for the first; it is read until drafts are worth more, for n
ids in the mean. The k with the most ids per second is sent if that is more than the stream would bring, its beginning
shared among n ids. To leave a stream that runs, drafts must pay for its next beginning alone. Chances are a drafter's
own estimates, corrected by how often such estimates came true; while the stream runs, drafts are compared with it too,
so that their worth is known without sending them.

Knows: measured times and verdicts. Does not know: clocks, HTTP, drafters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from edge_runtime.speculative.estimates import Mean

MAX_DRAFTS = 32
LEAST_AHEAD = 0.6  # the chance that a second window is of use
_BINS = (0.25, 0.5, 0.75, 0.9, 0.98)  # upper ends; the last bin goes to 1
_PRIOR_CHANCE = 0.7
_PRIOR_WEIGHT = 4  # verdicts that a drafter's own estimate counts for
_SHARE = 0.05  # of a new verdict in a chance, of a new time in a mean
_FORGET = 0.95
_PRIOR_ROUND_SECONDS, _PRIOR_TOKEN_SECONDS = 0.1, 0.03
_PRIOR_STRETCH = 64.0
_GAIN = 1.05  # what a change of mode must bring, lest noise decides


@dataclass(slots=True)
class Line:
    """Least squares through (x, y) with exponential forgetting; `prior` until something was measured."""

    prior: float
    _sums: list[float] = field(default_factory=lambda: [0.0] * 5)  # weight, x, y, x², x·y

    def add(self, x: float, y: float) -> None:
        self._sums = [
            _FORGET * old + new for old, new in zip(self._sums, (1, x, y, x * x, x * y), strict=True)
        ]

    def at(self, x: float) -> float:
        weight, sum_x, sum_y, sum_xx, sum_xy = self._sums
        if not weight:
            return self.prior
        mean_x, mean_y = sum_x / weight, sum_y / weight
        spread = sum_xx / weight - mean_x * mean_x
        slope = max(0.0, (sum_xy / weight - mean_x * mean_y) / spread) if spread > 0.25 else 0.0
        return max(mean_y + slope * (x - mean_x), mean_y / 10)


@dataclass(slots=True)
class Chances:
    """How often drafts of one source came true, by what their drafter said of them."""

    _bins: dict[tuple[str, int], Mean] = field(default_factory=dict)

    def judged(self, source: str, probability: float, *, is_right: bool) -> None:
        self._mean(source, probability).add(float(is_right))

    def mean(self, source: str) -> float:
        """Of all drafts of a source, judged recently or not."""
        found = [(mean.value, mean.count) for (name, _), mean in self._bins.items() if name == source]
        judged = sum(count for _, count in found)
        return sum(value * count for value, count in found) / judged if judged else _PRIOR_CHANCE

    def of(self, source: str, probability: float) -> float:
        return self._mean(source, probability).value

    def _mean(self, source: str, probability: float) -> Mean:
        place = sum(probability > end for end in _BINS)
        return self._bins.setdefault((source, place), Mean(_SHARE, min(probability, 0.95), _PRIOR_WEIGHT))


@dataclass(slots=True)
class Pace:
    """Of one server. `chances` and times stay from request to request."""

    max_drafts: int = MAX_DRAFTS
    chances: Chances = field(default_factory=Chances)
    _round: Line = field(default_factory=lambda: Line(_PRIOR_ROUND_SECONDS))
    _start: Mean = field(default_factory=lambda: Mean(_SHARE))
    _token: Mean = field(default_factory=lambda: Mean(_SHARE))
    _stretch: Mean = field(default_factory=lambda: Mean(0.2, _PRIOR_STRETCH, 1))  # ids of one stream
    _draft: dict[str, Mean] = field(default_factory=dict)  # seconds of one draft, by source

    def verified(self, drafts: int, seconds: float) -> None:
        """A window's answer took `seconds`."""
        self._round.add(drafts, seconds)

    def stream_began(self, seconds: float) -> None:
        """From asking for a stream to its first id."""
        self._start.add(seconds)

    def streamed(self, ids: int, seconds: float) -> None:
        """`ids` after the first came in `seconds`."""
        if ids > 0:
            self._token.add(seconds / ids)

    def stream_ended(self, ids: int) -> None:
        """A stream brought `ids` before it ended or was left."""
        self._stretch.add(max(1, ids))

    def drafted(self, source: str, ids: int, seconds: float) -> None:
        """Making `ids` drafts took `seconds`."""
        if ids > 0:
            self._draft.setdefault(source, Mean(_SHARE)).add(seconds / ids)

    def draft_seconds(self, source: str) -> float:
        return self._draft.get(source, Mean()).or_else(0.0)

    def wanted(self, source: str) -> int:
        """How many drafts to make at once: no more than would be sent, if each were as good as they are in the mean."""
        chance, seconds = self.chances.mean(source), self.draft_seconds(source)

        def rate(count: int) -> float:
            ids = sum(chance**depth for depth in range(count + 1))
            return ids / (self._round.at(count) + count * seconds)

        best = max(range(1, self.max_drafts + 1), key=rate)
        return best if best < self.max_drafts else 2 * best + 1  # for a second window, with an id between

    def ahead(self, source: str, probabilities: Sequence[float], supposed: int) -> int:
        """How many drafts to send in a second window, which is of use only if the first `supposed` come true."""
        path = 1.0
        for probability in probabilities[:supposed]:
            path *= self.chances.of(source, probability)
        left = min(self.max_drafts, len(probabilities) - supposed)
        return left if left > 0 and path >= LEAST_AHEAD else 0

    def round_seconds(self, drafts: int) -> float:
        return self._round.at(drafts)

    @property
    def token_seconds(self) -> float:
        return self._token.or_else(_PRIOR_TOKEN_SECONDS)

    @property
    def start_seconds(self) -> float:
        return self._start.or_else(self._round.at(0))

    def choose(self, source: str, probabilities: Sequence[float], *, is_streaming: bool) -> int:
        """How many of these drafts (a chain, each given the one before) to send now; 0: go on by stream."""
        best, best_rate, best_ids = 0, 0.0, 1.0
        path, ids = 1.0, 1.0
        for count, probability in enumerate(probabilities[: self.max_drafts], 1):
            path *= self.chances.of(source, probability)
            ids += path
            rate = ids / (self._round.at(count) + count * self.draft_seconds(source))
            if rate > best_rate:
                best, best_rate, best_ids = count, rate, ids
        if not best:
            return 0
        beginning = max(0.0, self.start_seconds - self.token_seconds)
        by_window = 1 / best_rate  # seconds of an id
        by_stream = self.token_seconds
        if is_streaming:
            by_window += beginning / best_ids
        else:
            by_stream += beginning / self._stretch.value
        return best if by_window * _GAIN < by_stream else 0
