"""The tail's sampler: penalties count what they should, and nothing but observe() changes state."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from edge_kernels import sampling
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.core import SamplingParams
from edge_runtime.engine.sampler import Sampler
from edge_runtime.errors import EngineError, UsageError

VOCABULARY = 40
LOGITS = np.random.default_rng(3).normal(size=VOCABULARY).astype(np.float32) * 2
BEST = int(np.argmax(LOGITS))
RUNNER_UP = int(np.argsort(LOGITS)[-2])


def sampler(**params: Any) -> Sampler:
    return Sampler(SamplingParams(**params), VOCABULARY)


def greedy(**params: Any) -> Sampler:
    return sampler(temperature=0.0, **params)


def test_greedy_takes_the_largest_and_the_lowest_id_of_a_tie() -> None:
    assert greedy().sample(LOGITS, 5) == (BEST, None)
    assert greedy().sample(np.zeros(VOCABULARY, np.float32), 5)[0] == 0


def test_samples_come_from_the_keyed_kernel() -> None:
    subject = sampler(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=2**63 + 1)
    for position in range(30):
        expected = sampling.sample(
            LOGITS.astype(np.float64),
            seed=2**63 + 1,
            position=position,
            temperature=0.8,
            top_k=20,
            top_p=0.9,
            min_p=0.01,
        )
        assert subject.sample(LOGITS, position)[0] == expected
        assert subject.sample(LOGITS, position)[0] == expected  # asking again changes nothing


@given(
    prompt=st.lists(st.integers(0, VOCABULARY - 1), max_size=20),
    generated=st.lists(st.integers(0, VOCABULARY - 1), max_size=20),
    seed=st.integers(0, 2**64 - 1),
    repetition=st.sampled_from([1.0, 1.3, 0.7]),
    presence=st.sampled_from([0.0, 0.5, -1.0]),
    frequency=st.sampled_from([0.0, 0.25]),
)
@settings(max_examples=60, deadline=None)
def test_one_by_one_or_all_at_once_is_the_same(
    prompt: list[int], generated: list[int], seed: int, repetition: float, presence: float, frequency: float
) -> None:
    """A resumed session observes its journalled ids in one go."""
    params = {
        "seed": seed,
        "repetition_penalty": repetition,
        "presence_penalty": presence,
        "frequency_penalty": frequency,
    }
    live, resumed = sampler(**params), sampler(**params)
    live.observe(prompt, generated=False)
    for token in generated:
        live.observe([token], generated=True)
    resumed.observe(generated, generated=True)
    resumed.observe(prompt, generated=False)
    assert live.sample(LOGITS, 50) == resumed.sample(LOGITS, 50)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_prompt_and_output() -> None:
    logits = np.full(VOCABULARY, -5.0, np.float32)
    logits[[1, 2]] = 3.0, 2.0
    subject = greedy(repetition_penalty=2.0)
    subject.observe([1], generated=False)  # 3.0 -> 1.5
    assert subject.sample(logits, 0)[0] == 2
    subject.observe([2], generated=True)  # 2.0 -> 1.0
    assert subject.sample(logits, 0)[0] == 1
    logits[[1, 2]] = -3.0, -4.0  # -> -6, -8: now below the others
    assert subject.sample(logits, 0)[0] == 0


def test_presence_and_frequency_penalties_look_at_generated_ids_only() -> None:
    gap = float(LOGITS[BEST] - LOGITS[RUNNER_UP])
    subject = greedy(presence_penalty=gap + 0.01)
    subject.observe([BEST], generated=False)
    assert subject.sample(LOGITS, 0)[0] == BEST
    subject.observe([BEST], generated=True)
    assert subject.sample(LOGITS, 0)[0] == RUNNER_UP

    subject = greedy(frequency_penalty=gap * 0.6)
    subject.observe([BEST], generated=True)
    assert subject.sample(LOGITS, 0)[0] == BEST
    subject.observe([BEST], generated=True)
    assert subject.sample(LOGITS, 0)[0] == RUNNER_UP


def test_logit_bias_forces_and_bans() -> None:
    assert greedy(logit_bias=((7, 100.0),)).sample(LOGITS, 0)[0] == 7
    assert greedy(logit_bias=((BEST, -100.0),)).sample(LOGITS, 0)[0] == RUNNER_UP


def test_log_probabilities_are_the_models_own() -> None:
    """Before penalties, bias and temperature; natural logarithm; most likely first."""
    subject = sampler(temperature=0.3, logit_bias=((7, 100.0),), top_logprobs=3)
    token, logprob = subject.sample(LOGITS, 0)
    exact = LOGITS.astype(np.float64) - np.log(np.exp(LOGITS.astype(np.float64)).sum())
    assert token == 7
    assert logprob is not None
    assert math.isclose(logprob.logprob, exact[7], rel_tol=1e-12)
    assert [i for i, _ in logprob.top] == np.argsort(-exact)[:3].tolist()
    assert sampler(top_logprobs=0).sample(LOGITS, 0)[1].top == ()  # type: ignore[union-attr]


def test_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(UsageError, match="outside the vocabulary"):
        sampler(logit_bias=((VOCABULARY, 1.0),))
    with pytest.raises(UsageError, match="finite"):
        sampler(logit_bias=((1, math.nan),))
    for bad in (-1, VOCABULARY):
        with pytest.raises(EngineError, match="outside the vocabulary"):
            sampler().observe([bad], generated=True)


def test_broken_logits_are_refused_with_their_position() -> None:
    logits = LOGITS.copy()
    logits[3] = np.nan
    with pytest.raises(EngineError, match=r"position 12 .* NaN"):
        sampler().sample(logits, 12)
    with pytest.raises(EngineError, match="40 logits"):
        sampler().sample(LOGITS[:-1], 12)
