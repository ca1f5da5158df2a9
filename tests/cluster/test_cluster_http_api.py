"""The HTTP API of a real cluster: the official client, streams that break, and the console in Chromium."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import openai
import pytest
from playwright.async_api import async_playwright, expect

from edge_runtime import DeviceSpec, LocalCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

PROMPT = "import os\n\n\ndef main("
ASKED = {"prompt": PROMPT, "max_tokens": 60, "extra_body": {"ignore_eos": True, "return_token_ids": True}}


@pytest.fixture(scope="module")
def cluster(demo_bundle: Path) -> Iterator[LocalCluster]:
    devices = [DeviceSpec(name=name) for name in ("phone", "tablet", "laptop")]
    with LocalCluster(demo_bundle, devices=devices, split="even") as cluster:
        yield cluster


@pytest.fixture
async def client(cluster: LocalCluster) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{cluster.url}/v1", api_key=cluster.api_key, max_retries=0
    ) as client:
        yield client


@pytest.fixture
async def http(cluster: LocalCluster) -> AsyncIterator[aiohttp.ClientSession]:
    headers = {"Authorization": f"Bearer {cluster.api_key}"}
    async with aiohttp.ClientSession(cluster.url, headers=headers) as http:
        yield http


async def test_the_official_client_gets_the_same_tokens_in_every_way(client: openai.AsyncOpenAI):
    model = (await client.models.list()).data[0].id
    asked = ASKED | {"model": model, "seed": 5, "temperature": 0.8}
    whole = await client.completions.create(**asked, n=3)
    alone = await client.completions.create(**asked)
    chunks = [chunk async for chunk in await client.completions.create(**asked, stream=True)]
    ids = [choice.model_extra["token_ids"] for choice in whole.choices]
    streamed = [each for chunk in chunks for each in chunk.choices[0].model_extra.get("token_ids", [])]
    assert ids[0] == alone.choices[0].model_extra["token_ids"] == streamed
    assert ids[0] != ids[1] != ids[2] != ids[0]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 180


async def test_log_probabilities_belong_to_the_text(client: openai.AsyncOpenAI):
    model = (await client.models.list()).data[0].id
    answer = await client.completions.create(**ASKED, model=model, temperature=0, logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or ()) == answer.choices[0].text
    for token, logprob, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert top[token] == logprob == max(top.values())  # greedy: the chosen token is the most likely


async def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(client: openai.AsyncOpenAI):
    model = (await client.models.list()).data[0]
    context = model.model_extra["max_model_len"]
    with pytest.raises(openai.BadRequestError, match=f"{context} tokens.*{context + 1}"):
        await client.completions.create(model=model.id, prompt=[1] * (context + 1))


async def test_a_stream_that_breaks_goes_on(http: aiohttp.ClientSession, client: openai.AsyncOpenAI):
    model = (await client.models.list()).data[0].id
    body = {
        "model": model,
        "prompt": PROMPT,
        "max_tokens": 200,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    seen = b""
    async with http.post("/v1/completions", json=body) as response:
        while seen.count(b"id: ") < 8:
            seen += await response.content.readany()
    whole_events = seen[: seen.rindex(b"\n\n")]
    last_id = whole_events[whole_events.rindex(b"id: ") + 4 :].split(b"\n")[0].decode()
    url = f"/v1/requests/{last_id.split('/')[0]}/stream"
    async with http.get(url, headers={"Last-Event-ID": last_id}) as response:
        assert response.status == 200
        rest = await response.read()
    undisturbed = await client.completions.create(
        model=model, prompt=PROMPT, max_tokens=200, temperature=0, extra_body={"ignore_eos": True}
    )
    assert text_of(whole_events) + text_of(rest) == undisturbed.choices[0].text
    assert rest.endswith(b"data: [DONE]\n\n")


def text_of(stream: bytes) -> str:
    chunks = [json.loads(line[6:]) for line in stream.decode().splitlines() if line.startswith("data: {")]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


async def test_a_client_that_leaves_frees_the_pipeline(
    http: aiohttp.ClientSession, client: openai.AsyncOpenAI
):
    model = (await client.models.list()).data[0].id
    body = {"model": model, "prompt": PROMPT, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    async with http.post("/v1/completions", json=body) as response:
        await response.content.readuntil(b"data: ")
    async with asyncio.timeout(5):
        while True:
            async with http.get("/admin/status") as response:
                if not (await response.json())["requests"]:
                    break


async def test_ready_metrics_and_status_tell_of_real_devices(http: aiohttp.ClientSession):
    async with http.get("/ready") as response:
        assert response.status == 200
    async with http.get("/metrics") as response:
        text = await response.text()
        assert "edge_runtime_pipeline_ready" in text
        assert text.count("edge_runtime_device_up{") == 3
    async with http.get("/admin/status") as response:
        status = await response.json()
    assert sum(device["layers"][1] - device["layers"][0] + 1 for device in status["devices"]) == 6


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="tests/browser fails where Chromium must be")
async def test_the_console_shows_and_uses_the_cluster(cluster: LocalCluster):
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--headless", "--no-sandbox", "--disable-gpu"]
        )
        page = await browser.new_page()
        await page.goto(f"{cluster.url}/#key={cluster.api_key}")
        await expect(page.get_by_role("img", name="Pipeline: phone runs layers 0–1")).to_be_visible()
        await page.get_by_role("button", name="Generate").click()
        await expect(page.locator("#output-note")).to_contain_text("finished", timeout=20_000)
        await browser.close()
