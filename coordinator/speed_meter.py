"""How fast tokens come: of the whole cluster lately, and of one session that has the pipeline to itself.

Knows: counts and times it is told. Does not know: clocks, sessions, devices.
"""

from __future__ import annotations

from collections import deque

CLUSTER_WINDOW_SECONDS = 5.0
SINGLE_TOKENS = 256  # of the latest decoding that the single-session figure is over


class SpeedMeter:
    def __init__(self) -> None:
        self._recent: deque[tuple[float, int]] = deque()
        self._single: deque[tuple[int, float]] = deque()
        self._single_tokens = 0

    def add(self, tokens: int, seconds: float, *, now: float, is_alone: bool) -> None:
        """`seconds` since this session's tokens before (0: it had none yet, prefill is not decoding)."""
        self._recent.append((now, tokens))
        self._forget(now)
        if is_alone and seconds > 0:
            self._single.append((tokens, seconds))
            self._single_tokens += tokens
            while self._single_tokens > SINGLE_TOKENS and len(self._single) > 1:
                self._single_tokens -= self._single.popleft()[0]

    def cluster_tokens_per_second(self, now: float) -> float:
        self._forget(now)
        if not self._recent:
            return 0.0
        span_seconds = max(now - self._recent[0][0], 1.0)
        return sum(tokens for _, tokens in self._recent) / span_seconds

    @property
    def single_tokens_per_second(self) -> float:
        seconds = sum(duration for _, duration in self._single)
        return self._single_tokens / seconds if seconds else 0.0

    def forget_single(self) -> None:
        """Another pipeline, another speed."""
        self._single.clear()
        self._single_tokens = 0

    def last_token_at(self) -> float:
        return self._recent[-1][0] if self._recent else -float("inf")

    def _forget(self, now: float) -> None:
        while self._recent and now - self._recent[0][0] > CLUSTER_WINDOW_SECONDS:
            self._recent.popleft()
