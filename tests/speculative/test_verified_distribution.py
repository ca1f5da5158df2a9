"""What comes out of drafting and verification has the target's distribution, by chi-square and total variation against
float64; samplers that are known to be wrong are rejected by the same gate.

The committed id is the target's own sample, so it holds for any draft. The tempting mistake, reported of other engines,
is to draft with the position's noise and then to verify by the ratio test (Leviathan et al. 2023), whose correction is
drawn with the same noise again.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from edge_kernels.sampling import gumbel_noise, sample
from numpy.typing import NDArray

from edge_runtime.agent.tail import TailSession
from edge_runtime.core import SamplingParams
from tests.support.goodness_of_fit import chi_square, total_variation

F64 = NDArray[np.float64]
DRAWS = 20_000
VOCABULARY = 16
GATE, MOST_VARIATION = 6.0, 0.02  # standard deviations; false alarms once in 1e9
SEED = 41
IDS = np.arange(VOCABULARY, dtype=np.uint32)

_rng = np.random.default_rng(8)
TARGET: F64 = _rng.normal(0, 1.2, VOCABULARY).astype(np.float32).astype(np.float64)
DRAFT: F64 = TARGET + _rng.normal(0, 0.7, VOCABULARY)

Verify = Callable[[int], int]  # a position -> its committed id


def probabilities(logits: F64, temperature: float = 1.0) -> F64:
    weights = np.exp((logits - logits.max()) / temperature)
    return np.asarray(weights / weights.sum())


P, Q = probabilities(TARGET), probabilities(DRAFT)
with np.errstate(divide="ignore"):
    RESIDUAL: F64 = np.log(np.maximum(P - Q, 0.0))  # of the ratio test's correction
TRIES = 60
CHANCES: F64 = _rng.random((DRAWS, TRIES))


def counts_of(verify: Verify) -> NDArray[np.int64]:
    return np.bincount([verify(position) for position in range(DRAWS)], minlength=VOCABULARY)


def test_what_the_tail_commits_has_the_target_s_distribution_whatever_is_drafted() -> None:
    """Rows in pairs: the id before, and the draft, which is sampled at only where it was right."""
    temperature = 0.7
    params = SamplingParams(temperature=temperature, seed=SEED)
    counts = np.zeros(VOCABULARY, np.int64)
    accepted = 0
    tail = TailSession(params, VOCABULARY, 1)
    ids, rows = [0], np.stack([TARGET.astype(np.float32)] * 2)
    while counts.sum() < DRAWS:
        base = len(ids) - 1
        guess = with_noise(DRAFT, len(ids), params.seed, temperature)
        tokens = tail.sample(base, (ids[-1], guess), rows)
        accepted += len(tokens) - 1
        ids += [token.id for token in tokens]
        counts += np.bincount([token.id for token in tokens], minlength=VOCABULARY)
        if len(ids) > 400:  # what the tail keeps of a session is not the subject
            params = SamplingParams(temperature=temperature, seed=params.seed + 1)
            tail, ids = TailSession(params, VOCABULARY, 1), [0]
    p = probabilities(TARGET, temperature)
    assert chi_square(counts, p) < GATE
    assert total_variation(counts, p) < MOST_VARIATION
    assert accepted > 0.3 * DRAWS / 2  # drafts took part


def with_noise(logits: F64, position: int, seed: int = SEED, temperature: float = 1.0) -> int:
    return sample(logits, seed=seed, position=position, temperature=temperature)


def own_sample(position: int) -> int:
    """The rule of docs/speculative.md: whatever was drafted, the target's own sample is committed."""
    return with_noise(TARGET, position)


def ratio_test(position: int, *, seed_of_correction: int) -> int:
    """Draft with the keyed noise; accept with min(1, p / q), else draw the residual with the noise of that seed."""
    drafted = with_noise(DRAFT, position)
    if CHANCES[position, 0] * Q[drafted] < P[drafted]:
        return drafted
    return int(np.argmax(RESIDUAL + gumbel_noise(seed_of_correction, position, IDS)))


def no_correction(position: int) -> int:
    """Tries again with other noise until the ratio test accepts, which commits too much of what the draft likes."""
    for attempt in range(TRIES):
        drafted = with_noise(DRAFT, position, SEED + attempt)
        if CHANCES[position, attempt] * Q[drafted] < P[drafted]:
            return drafted
    raise AssertionError("nothing was accepted")


def first_of_two(position: int) -> int:
    """Accepts a draft that any of two samples of the target equals."""
    drafted, samples = with_noise(DRAFT, position), (own_sample(position), with_noise(TARGET, position, 7))
    return drafted if drafted in samples else samples[0]


@pytest.mark.parametrize(
    "verify",
    [own_sample, lambda position: ratio_test(position, seed_of_correction=SEED + 1)],
    ids=["own sample", "ratio test with noise of its own"],
)
def test_right_verifiers_pass_the_gate(verify: Verify) -> None:
    counts = counts_of(verify)
    assert chi_square(counts, P) < GATE
    assert total_variation(counts, P) < MOST_VARIATION


@pytest.mark.parametrize(
    "verify",
    [
        lambda position: ratio_test(position, seed_of_correction=SEED),
        no_correction,
        first_of_two,
        lambda position: with_noise(DRAFT, position),
    ],
    ids=["ratio test with the drafts' noise", "no correction", "either of two samples", "the draft itself"],
)
def test_wrong_verifiers_are_rejected(verify: Verify) -> None:
    """Negative controls: each of them looks plausible, and 20 000 draws tell."""
    assert chi_square(counts_of(verify), P) > GATE
