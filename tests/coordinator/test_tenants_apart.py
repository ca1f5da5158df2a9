"""Two API keys, one prompt: what a tenant's requests leave on the devices is of no use to another tenant."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import pytest

from tests.support.whole_cluster import ALICE, BOB, served

PROMPT = "def read(path):\n" * 20


async def complete(url: str, key: str, **options: object) -> tuple[str, int]:
    """(text, cached tokens)"""
    body = {"model": "", "prompt": PROMPT, "max_tokens": 24, "ignore_eos": True, **options}
    headers = {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(headers=headers) as http:
        async with http.get(f"{url}/v1/models") as models:
            body["model"] = (await models.json())["data"][0]["id"]
        async with http.post(f"{url}/v1/completions", json=body) as response:
            assert response.status == 200, await response.text()
            answer = await response.json()
    usage = answer["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert 0 <= cached < usage["prompt_tokens"]
    return answer["choices"][0]["text"], cached


async def hits(url: str) -> float:
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {ALICE}"}) as http,
        http.get(f"{url}/metrics") as response,
    ):
        lines = (await response.text()).splitlines()
    return sum(float(line.split()[-1]) for line in lines if "prefix_cache_hits_total{" in line)


@pytest.mark.timeout(120)
async def test_the_same_prompt_of_another_tenant_is_computed_again(tmp_path: Path) -> None:
    async with served(tmp_path) as cluster:
        url = cluster.url
        sampled = {"temperature": 0.8, "seed": 3}
        text, cached = await complete(url, ALICE, **sampled)
        assert cached == 0
        again, cached = await complete(url, ALICE, **sampled)
        assert cached >= 32
        assert await hits(url) == cached
        of_bob, none = await complete(url, BOB, **sampled)
        assert none == 0
        assert await hits(url) == cached
        _, of_his_own = await complete(url, BOB, temperature=0.0)
        assert of_his_own == cached
        assert text == again == of_bob
