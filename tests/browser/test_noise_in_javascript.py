"""Keyed noise in a real JavaScript engine: the golden vectors, and the bits of NumPy's on random keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_kernels import reference_sampling as reference
from edge_kernels.sampling import choice_seed
from playwright.async_api import Page

from tests.support import chromium

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="module")]

GOLDEN = json.loads((Path(__file__).parents[1] / "kernels" / "noise_golden.json").read_text())
KEYS = 4000
ROWS = 300
IMPORT = """const noise = await import("/console/sampling/noise.js");
const { sample, logProbabilities } = await import("/console/sampling/sampler.js");
const bits = (x) => new BigUint64Array(new Float64Array([x]).buffer)[0].toString();
const double = (text) => new Float64Array(new BigUint64Array([BigInt(text)]).buffer)[0];"""


async def run(page: Page, body: str, given: Any) -> Any:
    """As `chromium.run`, with the modules."""
    return await chromium.run(page, f"{IMPORT}\n{body}", given)


def bits(value: float) -> str:
    """A double as text that no parser rounds."""
    return str(int(np.float64(value).view(np.uint64)))


def golden_bits(values: list[str]) -> list[str]:
    return [bits(float.fromhex(value)) for value in values]


def golden_logits(vocabulary: int) -> list[float]:
    spread = np.arange(vocabulary, dtype=np.uint64) * 2654435761 % 2**32
    return [float(value) for value in spread.astype(np.float64) / 2**28 - 8.0]


async def test_words_are_the_published_ones(modules: Page) -> None:
    vectors = [
        [[int(word, 16) for word in vector[name]] for name in ("key", "counter", "words")]
        for vector in GOLDEN["threefry"]
    ]
    words = await run(
        modules, "return given.map(([key, counter]) => noise.threefry(key, ...counter));", vectors
    )
    assert words == [expected for _, _, expected in vectors]


async def test_noise_logarithm_exponential_and_choice_seeds_are_golden(modules: Page) -> None:
    draw = """return given.map(({ seed, position, ids }) => {
      const key = noise.splitSeed(BigInt(seed));
      return [noise.uniform, noise.gumbelNoise].map((value) => ids.map((id) => bits(value(key, position, id))));
    });"""
    for found, vector in zip(await run(modules, draw, GOLDEN["noise"]), GOLDEN["noise"], strict=True):
        assert found == [golden_bits(vector["uniform"]), golden_bits(vector["gumbel"])]
    for name in ("log", "exp"):
        body = f"return given.map((x) => bits(noise.{name}(double(x))));"
        found = await run(modules, body, golden_bits(GOLDEN[name]["x"]))
        assert found == golden_bits(GOLDEN[name]["y"])
    seeds = "return given.map(([seed, choice]) => noise.choiceSeed(BigInt(seed), choice).toString());"
    assert await run(modules, seeds, GOLDEN["choice_seed"]) == [seed for _, _, seed in GOLDEN["choice_seed"]]


async def test_samples_and_log_probabilities_are_golden(modules: Page) -> None:
    draw = """return given.logits.map((logits, row) => {
      const { seed, ids, temperature, top_k: topK, top_p: topP, min_p: minP } = given.vectors[row];
      return ids.map((_, position) => sample(logits, { seed: BigInt(seed), position, temperature, topK, topP, minP }));
    });"""
    logits = [golden_logits(vector["vocabulary"]) for vector in GOLDEN["sample"]]
    found = await run(modules, draw, {"logits": logits, "vectors": GOLDEN["sample"]})
    assert found == [vector["ids"] for vector in GOLDEN["sample"]]

    vector = GOLDEN["log_probabilities"]
    body = """const [chosen, top] = logProbabilities(given.logits, given.chosen, given.count);
    return [bits(chosen), top.map(([id, value]) => [id, bits(value)])];"""
    given = {
        "logits": golden_logits(vector["vocabulary"]),
        "chosen": vector["chosen"],
        "count": len(vector["top"]),
    }
    expected = [[id_, bits(float.fromhex(value))] for id_, value in vector["top"]]
    assert await run(modules, body, given) == [bits(float.fromhex(vector["logprob"])), expected]


async def test_random_keys_give_the_bits_of_numpy(modules: Page) -> None:
    rng = np.random.default_rng(5)
    keys = [
        (int(seed), int(position), int(token))
        for seed, position, token in zip(
            rng.integers(0, 2**64, KEYS, np.uint64),
            rng.integers(0, 2**32, KEYS, np.uint64) >> rng.integers(0, 32, KEYS, np.uint64),
            rng.integers(0, 2**32, KEYS, np.uint64) >> rng.integers(0, 32, KEYS, np.uint64),
            strict=True,
        )
    ]
    draw = """return given.map(([seed, position, id]) => {
      const key = noise.splitSeed(BigInt(seed));
      return [noise.uniform, noise.gumbelNoise].map((value) => bits(value(key, position, id)));
    });"""
    found = await run(modules, draw, [(str(seed), position, token) for seed, position, token in keys])
    for (seed, position, token), values in zip(keys, found, strict=True):
        ids = np.array([token], np.uint32)
        u = reference.uniform(seed, position, ids)[0]
        assert values == [bits(u), bits(reference.gumbel_noise(seed, position, ids)[0])], (
            seed,
            position,
            token,
        )

    choices = [(str(seed), position % 100) for seed, position, _ in keys]
    body = "return given.map(([seed, choice]) => noise.choiceSeed(BigInt(seed), choice).toString());"
    assert await run(modules, body, choices) == [str(choice_seed(int(s), c)) for s, c in choices]


async def test_random_doubles_have_the_logarithm_and_exponential_of_numpy(modules: Page) -> None:
    rng = np.random.default_rng(6)
    positive = np.exp(rng.uniform(-700, 700, KEYS))
    below = -np.exp(rng.uniform(-40, 6.57, KEYS))
    for name, values, function in (("log", positive, reference.log), ("exp", below, reference.exp)):
        body = f"return given.map((x) => bits(noise.{name}(double(x))));"
        found = await run(modules, body, [bits(value) for value in values])
        assert found == [bits(value) for value in function(values)]


async def test_random_rows_give_the_ids_of_numpy(modules: Page) -> None:
    rng = np.random.default_rng(7)
    rows, expected = [], []
    for _ in range(ROWS):
        logits = np.round(rng.normal(0, 4, rng.integers(1, 60)), int(rng.integers(0, 4)))
        options = {
            "temperature": float(rng.choice([0.0, 0.01, 0.7, 1.0, 1.3, 100.0])),
            "top_k": int(rng.choice([0, 1, 2, 7, 100])),
            "top_p": float(rng.choice([1e-9, 0.3, 0.9, 0.999999, 1.0])),
            "min_p": float(rng.choice([0.0, 0.05, 0.5, 1.0])),
        }
        seed, position = int(rng.integers(0, 2**64, dtype=np.uint64)), int(rng.integers(0, 2**32))
        expected.append(reference.sample(logits, seed=seed, position=position, **options))  # type: ignore[arg-type]
        rows.append(
            {"logits": [float(x) for x in logits], "seed": str(seed), "position": position, **options}
        )
    draw = """return given.map(({ logits, seed, position, temperature, top_k: topK, top_p: topP, min_p: minP }) =>
      sample(logits, { seed: BigInt(seed), position, temperature, topK, topP, minP }));"""
    assert await run(modules, draw, rows) == expected
