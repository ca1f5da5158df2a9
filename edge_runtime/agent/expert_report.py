"""Now and then, what the expert cache did since the last time: for the log and the status lines.

Knows: counters and when they were told. Does not know: logs, how experts are read.
"""

from __future__ import annotations

from edge_runtime.agent.status import Experts
from edge_runtime.experts.cache import ExpertCache

REPORT_SECONDS = 60.0
_NOTHING = (0, 0, 0, 0, 0.0)


class ExpertReporter:
    """`report(now, cache, …)` gives something to tell at most once a minute, and only where experts were used."""

    def __init__(self) -> None:
        self._told_at = float("-inf")
        self._cache: ExpertCache | None = None
        self._told = _NOTHING

    def report(
        self, now: float, cache: ExpertCache | None, quality: str = "", peers: str = ""
    ) -> Experts | None:
        """`quality`: what it costs that the cache uses experts before they are whole, where it does; `peers`: what
        other devices did for it."""
        if cache is not self._cache:
            self._cache, self._told, self._told_at = cache, _NOTHING, now
        if cache is None or now - self._told_at < REPORT_SECONDS:
            return None
        total = cache.statistics.total
        all_read_bytes = total.read_bytes + total.upgraded_bytes + total.read_ahead_bytes
        counts = (total.hits, total.misses, all_read_bytes, total.fewer_bits, total.waited_seconds)
        hits, misses, read_bytes, fewer_bits, waited_seconds = (
            new - old for new, old in zip(counts, self._told, strict=True)
        )
        if hits + misses == 0:
            return None
        self._told_at, self._told = now, counts
        layers = cache.statistics.layers
        worst = min(layers, key=lambda layer: layers[layer].hit_rate)
        return Experts(
            hits=int(hits),
            misses=int(misses),
            read_bytes=int(read_bytes),
            waited_seconds=float(waited_seconds),
            worst_layer=worst,
            worst_layer_hit_rate=layers[worst].hit_rate,
            mended=cache.reader.counters.reread,
            fewer_bits=int(fewer_bits),
            quality=quality,
            peers=peers,
            prediction="" if cache.prediction is None else cache.prediction.says,
        )
