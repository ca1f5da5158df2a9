"""How fast tokens come: of the whole cluster lately, and of one session that has the pipeline to itself.

Knows: counts and times it is told. Does not know: clocks, sessions, devices.
"""

from __future__ import annotations

from collections import deque

CLUSTER_WINDOW_SECONDS = 5.0
SINGLE_TOKENS = 256  # of the latest decoding that the single-session figure is over
MAX_LEASES = 16  # whose speed is remembered


class SpeedMeter:
    def __init__(self) -> None:
        self._recent: deque[tuple[float, int]] = deque()
        self._single: dict[int, deque[tuple[int, float]]] = {}  # by lease

    def add(self, tokens: int, seconds: float, *, now: float, lease: int, is_alone: bool) -> None:
        """`seconds` since this session's tokens before (0: it had none yet, prefill is not decoding)."""
        self._recent.append((now, tokens))
        self._forget(now)
        if not is_alone or seconds <= 0:
            return
        single = self._single.pop(lease, None) or deque(maxlen=SINGLE_TOKENS)
        self._single[lease] = single  # the latest lease is the last
        while len(self._single) > MAX_LEASES:
            del self._single[next(iter(self._single))]
        single.append((tokens, seconds))
        while sum(count for count, _ in single) > SINGLE_TOKENS and len(single) > 1:
            single.popleft()

    def cluster_tokens_per_second(self, now: float) -> float:
        self._forget(now)
        if not self._recent:
            return 0.0
        span_seconds = max(now - self._recent[0][0], 1.0)
        return sum(tokens for _, tokens in self._recent) / span_seconds

    def single_tokens_per_second(self, lease: int) -> float:
        """Of one session on the pipeline of this lease that was alone in the cluster."""
        single = self._single.get(lease, ())
        seconds = sum(duration for _, duration in single)
        return sum(count for count, _ in single) / seconds if seconds else 0.0

    def last_token_at(self) -> float:
        return self._recent[-1][0] if self._recent else -float("inf")

    def _forget(self, now: float) -> None:
        while self._recent and now - self._recent[0][0] > CLUSTER_WINDOW_SECONDS:
            self._recent.popleft()
