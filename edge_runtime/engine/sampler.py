"""The tail's sampler: one session's penalties and counts in front of the keyed sampling kernel.

Knows: SamplingParams and which ids the session has seen. Does not know: batches, positions' meaning, stop conditions.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from edge_kernels import sampling
from numpy.typing import NDArray

from edge_runtime.core import SamplingParams, TokenLogprob
from edge_runtime.errors import EngineError, UsageError


class Sampler:
    """Turns logits into ids for one session. Counts change only in `observe`, so `sample` may be asked again.

    Repetition penalty looks at prompt and generated ids, presence and frequency penalties at generated ids alone.
    """

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        self._params = params
        self._vocab_size = vocab_size
        bias = dict(params.logit_bias)
        self._bias_ids = np.fromiter(bias.keys(), np.int64, len(bias))
        self._bias = np.fromiter(bias.values(), np.float64, len(bias))
        if not np.isfinite(self._bias).all():
            raise UsageError(
                "logit_bias must be finite numbers", hint="use -100 to 100, as OpenAI's API does"
            )
        if not self._known(self._bias_ids):
            raise UsageError(
                "logit_bias names a token id outside the vocabulary",
                hint=f"this model's token ids are 0 to {vocab_size - 1}",
            )
        self._seen: set[int] = set()
        self._generated: dict[int, int] = {}

    def observe(self, ids: Iterable[int], *, generated: bool) -> None:
        """Count ids that joined the session: the prompt's, then each one committed."""
        new = list(ids)
        if not self._known(np.asarray(new, np.int64)):
            raise EngineError(
                "a token id lies outside the vocabulary", hint=f"ids end at {self._vocab_size - 1}"
            )
        self._seen.update(new)
        if generated:
            for token in new:
                self._generated[token] = self._generated.get(token, 0) + 1

    def sample(self, logits: NDArray[np.float32], position: int) -> tuple[int, TokenLogprob | None]:
        """The id for absolute position `position` (prompt included), and its log-probability where asked for."""
        if logits.shape != (self._vocab_size,):
            raise EngineError(f"the sampler needs {self._vocab_size} logits, not shape {logits.shape}")
        params = self._params
        try:
            token = sampling.sample(
                self.penalised(logits),
                seed=params.seed,
                position=position,
                temperature=params.temperature,
                top_k=params.top_k,
                top_p=params.top_p,
                min_p=params.min_p,
            )
        except ValueError as error:
            raise EngineError(
                f"position {position} can't be sampled: {error}",
                hint="the model made logits that are not finite; try the fp32 bundle, or report the bundle",
            ) from error
        return token, self._logprob(logits, token)

    def _logprob(self, logits: NDArray[np.float32], token: int) -> TokenLogprob | None:
        if self._params.top_logprobs < 0:
            return None
        chosen, top = sampling.log_probabilities(logits.astype(np.float64), token, self._params.top_logprobs)
        return TokenLogprob(chosen, tuple(top))

    def penalised(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """Repetition, presence, frequency, then bias; float64, one rounding per operation, so the same everywhere."""
        values = logits.astype(np.float64)
        params = self._params
        if params.repetition_penalty != 1.0 and self._seen:
            seen = np.fromiter(self._seen, np.int64, len(self._seen))
            old = values[seen]
            values[seen] = np.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
        if self._generated and (params.presence_penalty or params.frequency_penalty):
            ids = np.fromiter(self._generated.keys(), np.int64, len(self._generated))
            counts = np.fromiter(self._generated.values(), np.float64, len(self._generated))
            values[ids] -= params.presence_penalty
            values[ids] -= counts * params.frequency_penalty
        values[self._bias_ids] += self._bias
        return values

    def _known(self, ids: NDArray[np.int64]) -> bool:
        return bool(((ids >= 0) & (ids < self._vocab_size)).all())
