"""Keyed sampling: published vectors, frozen golden vectors, the reference bit for bit, and the right distribution."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_kernels import reference_sampling as reference
from edge_kernels.sampling import choice_seed, gumbel_noise, log_probabilities, sample, threefry
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.support.goodness_of_fit import chi_square, total_variation

F64 = NDArray[np.float64]
GOLDEN = json.loads(Path(__file__).with_name("noise_golden.json").read_text())


def golden_logits(vocabulary: int) -> F64:
    """(i * 2654435761 mod 2^32) / 2^28 - 8: spread over [-8, 8), exact in float64, no generator needed."""
    return (np.arange(vocabulary, dtype=np.uint64) * 2654435761 % 2**32).astype(np.float64) / 2**28 - 8.0


def hexadecimal(values: F64) -> list[str]:
    return [float(value).hex() for value in values]


def from_hex(values: list[str]) -> F64:
    return np.array([float.fromhex(value) for value in values])


@pytest.mark.parametrize("vector", GOLDEN["threefry"])
def test_threefry_gives_the_published_words(vector: dict[str, list[str]]) -> None:
    key, counter, expected = (
        [int(word, 16) for word in vector[name]] for name in ("key", "counter", "words")
    )
    c0, c1 = (np.array([word], np.uint32) for word in counter)
    for implementation in (threefry, reference.threefry):
        x0, x1 = implementation((key[0], key[1]), c0, c1)
        assert [int(x0[0]), int(x1[0])] == expected


@pytest.mark.parametrize("vector", GOLDEN["noise"])
def test_noise_is_golden(vector: dict[str, Any]) -> None:
    seed, position = int(vector["seed"]), vector["position"]
    ids = np.array(vector["ids"], np.uint32)
    assert hexadecimal(reference.uniform(seed, position, ids)) == vector["uniform"]
    assert hexadecimal(reference.gumbel_noise(seed, position, ids)) == vector["gumbel"]
    assert hexadecimal(gumbel_noise(seed, position, ids)) == vector["gumbel"]


def test_logarithm_and_exponential_are_golden() -> None:
    for name, function in (("log", reference.log), ("exp", reference.exp)):
        assert hexadecimal(function(from_hex(GOLDEN[name]["x"]))) == GOLDEN[name]["y"]


@pytest.mark.parametrize("vector", GOLDEN["sample"])
def test_samples_are_golden(vector: dict[str, Any]) -> None:
    logits = golden_logits(vector["vocabulary"])
    options = {name: vector[name] for name in ("temperature", "top_k", "top_p", "min_p")}
    for implementation in (sample, reference.sample):
        ids = [
            implementation(logits, seed=int(vector["seed"]), position=position, **options)
            for position in range(len(vector["ids"]))
        ]
        assert ids == vector["ids"]


def test_log_probabilities_and_choice_seeds_are_golden() -> None:
    vector = GOLDEN["log_probabilities"]
    for implementation in (log_probabilities, reference.log_probabilities):
        chosen, top = implementation(
            golden_logits(vector["vocabulary"]), vector["chosen"], len(vector["top"])
        )
        assert chosen.hex() == vector["logprob"]
        assert [[i, value.hex()] for i, value in top] == vector["top"]
    for seed, choice, derived in GOLDEN["choice_seed"]:
        assert choice_seed(int(seed), choice) == int(derived)


logit_rows = st.lists(
    st.one_of(
        st.floats(-30, 30),
        st.sampled_from([-math.inf, -1e300, 0.0, -0.0, 1.0, 1.0, 1.0 + 2**-52, 700.0, -700.0]),
    ),
    min_size=1,
    max_size=60,
).filter(lambda row: max(row) > -math.inf)


@given(
    row=logit_rows,
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**32 - 1),
    temperature=st.sampled_from([0.0, 0.01, 0.7, 1.0, 1.3, 100.0]),
    top_k=st.sampled_from([0, 1, 2, 7, 100]),
    top_p=st.sampled_from([1e-9, 0.3, 0.9, 0.999999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
@settings(max_examples=500, deadline=None)
def test_native_samples_equal_the_reference(
    row: list[float], seed: int, position: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = np.array(row)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    expected = reference.sample(logits, seed=seed, position=position, **options)  # type: ignore[arg-type]
    assert sample(logits, seed=seed, position=position, **options) == expected  # type: ignore[arg-type]
    chosen = log_probabilities(logits, expected, 5)
    assert chosen == reference.log_probabilities(logits, expected, 5)


@given(row=logit_rows)
@settings(max_examples=100, deadline=None)
def test_logarithm_and_exponential_are_within_two_units(row: list[float]) -> None:
    x = np.array(row)
    below = -np.abs(x[np.abs(x) < 700])
    np.testing.assert_allclose(reference.exp(below), np.exp(below), rtol=5e-16)
    positive = np.exp(below)
    np.testing.assert_allclose(reference.log(positive), np.log(positive), rtol=5e-16, atol=1e-300)


def test_noise_has_no_pattern_along_its_keys() -> None:
    """Uniform over ids, positions and seeds alike: mean, variance, and neighbours uncorrelated."""
    count = 20_000
    ids = np.arange(count, dtype=np.uint32)
    streams = [
        reference.uniform(7, 11, ids),
        np.array([reference.uniform(7, position, ids[:1])[0] for position in range(2000)]),
        np.array([reference.uniform(seed << 32, 5, ids[:1])[0] for seed in range(2000)]),
    ]
    for u in streams:
        assert ((u > 0) & (u < 1)).all()
        assert abs(u.mean() - 0.5) < 4 / math.sqrt(12 * len(u))
        assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 4 / math.sqrt(len(u))


DRAWS = 20_000
VOCABULARY = 24


def draw(temperature: float, **options: float) -> NDArray[np.int64]:
    logits = golden_logits(VOCABULARY) / 3
    ids = [
        sample(logits, seed=99, position=p, temperature=temperature, **options)  # type: ignore[arg-type]
        for p in range(DRAWS)
    ]
    return np.bincount(ids, minlength=VOCABULARY)


def distribution(temperature: float, kept: NDArray[np.bool_] | None = None) -> F64:
    """Float64 softmax, by NumPy's own functions."""
    z = golden_logits(VOCABULARY) / 3 / temperature
    p = np.exp(z - z.max())
    if kept is not None:
        p = np.where(kept, p, 0)
    return p / p.sum()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_samples_follow_the_distribution(temperature: float) -> None:
    counts, p = draw(temperature), distribution(temperature)
    assert chi_square(counts, p) < 6
    assert total_variation(counts, p) < 0.02


def test_the_distribution_test_rejects_a_biased_sampler() -> None:
    """Negative control: the same draws against a distribution 3 % away must fail the same gate."""
    p = distribution(1.0)
    likely, next_likely = np.argsort(p)[::-1][:2]
    p[likely] += 0.03
    p[next_likely] -= 0.03
    assert chi_square(draw(1.0), p) > 6


def test_filters_keep_what_they_say() -> None:
    p = distribution(1.0)
    order = np.argsort(-p, kind="stable")
    nucleus = np.zeros(VOCABULARY, bool)
    nucleus[order[: int(np.searchsorted(np.cumsum(p[order]), 0.8)) + 1]] = True
    for options, kept in (
        ({"top_k": 5}, np.isin(np.arange(VOCABULARY), order[:5])),
        ({"top_p": 0.8}, nucleus),
        ({"min_p": 0.2}, p >= 0.2 * p.max()),
    ):
        counts = draw(1.0, **options)  # type: ignore[arg-type]
        assert not counts[~kept].any()
        assert chi_square(counts, distribution(1.0, kept)) < 6


def test_colder_samples_stay_with_the_noise_of_their_position() -> None:
    """As temperature falls the draw moves towards the argmax and never away from it."""
    logits = golden_logits(50)
    for position in range(50):
        ids = [sample(logits, seed=1, position=position, temperature=t) for t in (2.0, 1.0, 0.5, 0.1, 0.0)]
        assert all(logits[later] >= logits[earlier] for earlier, later in pairwise(ids))


@pytest.mark.parametrize(
    ("logits", "options", "message"),
    [
        ([0.0, math.nan], {}, "NaN"),
        ([math.inf, 0.0], {}, "inf"),
        ([-math.inf, -math.inf], {}, "finite"),
        ([], {}, "empty"),
        ([0.0], {"temperature": -1.0}, "temperature"),
        ([0.0], {"top_p": 0.0}, "top_p"),
        ([0.0], {"min_p": 1.5}, "min_p"),
        ([0.0], {"top_k": -1}, "top_k"),
        ([0.0], {"seed": 2**64}, "64 bits"),
        ([0.0], {"position": -1}, "32 bits"),
    ],
)
def test_bad_input_is_refused(logits: list[float], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(np.array(logits), **{"seed": 1, "position": 2, "temperature": 1.0, **options})


def test_log_probabilities_refuse_ids_outside() -> None:
    with pytest.raises(ValueError, match="inside the vocabulary"):
        log_probabilities(np.zeros(3), 3, 1)
