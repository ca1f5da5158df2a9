"""A page that holds the drafter: over a fake service what a person sees, over a real cluster the same text."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from itertools import pairwise

import pytest
from playwright.async_api import Browser, Page, expect

from edge_runtime import DeviceSpec, LocalCluster
from edge_runtime.sdk.cluster import demo_bundle
from tests.support.api_server import ADMIN_KEY, Server
from tests.support.chromium import watch
from tests.support.copied_code import COPIED_CODE
from tests.support.http_only_proxy import http_only

REPETITIVE = COPIED_CODE
KEPT_SOCKETS = """const Plain = WebSocket; window.sockets = [];
window.WebSocket = class extends Plain { constructor(...given) { super(...given); window.sockets.push(this); } };"""

pytestmark = pytest.mark.browser


async def generate(page: Page, prompt: str, tokens: int, *, temperature: float = 0.0) -> str:
    """The generated text, without the prompt."""
    await page.get_by_label("Prompt").fill(prompt)
    await page.get_by_role("spinbutton", name="Tokens").fill(str(tokens))
    await page.get_by_role("spinbutton", name="Temperature").fill(str(temperature))
    await page.get_by_role("button", name="Generate").click()
    await expect(page.locator("#output-note")).to_contain_text("finished", timeout=60_000)
    return (await page.locator("#output span").nth(1).text_content()) or ""


async def drafts(page: Page) -> tuple[int, int]:
    """(right, made) as the page shows them."""
    note = await page.locator("#output-note").text_content()
    found = re.search(r"(\d+) of (\d+) drafts? right", note or "")
    assert found, note
    return int(found[1]), int(found[2])


# ---------------------------------------------------------------- over a fake service


async def opened(browser: Browser, url: str, key: str = ADMIN_KEY) -> Page:
    page = await browser.new_page()
    await page.add_init_script(KEPT_SOCKETS)
    await page.goto(f"{url}/#key={key}")
    await expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    return page


async def test_a_page_drafts_over_its_own_socket_and_its_key_is_in_no_address(
    browser: Browser, server: Server
) -> None:
    page = await opened(browser, server.url)
    errors, hosts = watch(page)
    plain = await generate(page, "abc", 40)
    await page.get_by_label("Draft on this device").check()
    drafted = await generate(page, "abc", 40)
    assert len(plain) == len(drafted) == 40
    addresses = await page.evaluate("sockets.map(({ url, protocol }) => [url, protocol])")
    assert addresses == [[f"ws://127.0.0.1:{server.port}/v1/drafting", "edge-runtime.drafting"]]
    assert await page.evaluate("localStorage.length + document.cookie.length") == 0
    assert errors == []
    assert hosts == {f"127.0.0.1:{server.port}"}


async def test_what_was_said_before_is_drafted_from_until_it_is_forgotten(
    browser: Browser, server: Server
) -> None:
    page = await opened(browser, server.url)
    await page.get_by_label("Draft on this device").check()
    forget = page.locator("#forget-drafts")
    await expect(forget).to_be_hidden()
    await generate(page, "abc", 30)
    await expect(forget).to_have_text("Forget 31 tokens of past answers")  # and what parts it from others
    await forget.click()
    await expect(forget).to_be_hidden()


async def test_a_broken_socket_is_taken_up_again_and_no_text_is_lost_or_doubled(
    browser: Browser, server: Server
) -> None:
    server.service.hold = hold = asyncio.Event()
    page = await opened(browser, server.url)
    await page.get_by_label("Draft on this device").check()
    await page.get_by_label("Prompt").fill("abc")
    await page.get_by_role("spinbutton", name="Tokens").fill("60")
    await page.get_by_role("button", name="Generate").click()
    await expect(page.locator("#output-note")).to_contain_text("1 token")
    await page.evaluate("sockets[0].close()")
    await expect(page.locator("#output-note")).to_contain_text("60 tokens", timeout=20_000)
    assert not hold.is_set()  # the first link never got further
    text = await page.locator("#output span").nth(1).text_content()
    assert text is not None
    assert len(text) == 60
    assert all((ord(b) - ord(a)) % 26 == 1 for a, b in pairwise(text))
    assert await page.evaluate("sockets.length") == 2


async def test_stop_cancels_and_a_refusal_is_shown(browser: Browser, server: Server) -> None:
    server.service.hold = asyncio.Event()
    page = await opened(browser, server.url)
    await page.get_by_label("Draft on this device").check()
    await page.get_by_role("button", name="Generate").click()
    await expect(page.locator("#requests tbody tr")).to_have_count(1)
    await page.get_by_role("button", name="Stop").click()
    await expect(page.locator("#output-note")).to_have_text("stopped")
    await server.service.all_closed.wait()

    await page.get_by_role("spinbutton", name="Tokens").fill("4000")
    await page.get_by_role("button", name="Generate").click()
    await expect(page.locator("#output-note")).to_contain_text("context")


@pytest.mark.parametrize("answers", [True, False], ids=["refused", "never answered"])
async def test_where_no_socket_opens_the_whole_text_comes_without_drafts(
    browser: Browser, server: Server, answers: bool
) -> None:
    async with http_only(server.port, answers_upgrades=answers) as address:
        page = await opened(browser, address)
        await page.get_by_label("Draft on this device").check()
        text = await generate(page, "abc", 40)
        assert len(text) == 40
        assert all((ord(b) - ord(a)) % 26 == 1 for a, b in pairwise(text))
        assert await page.evaluate("sockets.length") == 1
        await expect(page.locator("#output-note")).not_to_contain_text("draft")
        await expect(page.locator("#draft-note")).to_contain_text("came without drafts")
        await page.close()


# ---------------------------------------------------------------- over a real cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(demo_bundle(), devices=[DeviceSpec(name=name) for name in ("a", "b")]) as cluster:
        yield cluster


@pytest.mark.cluster
@pytest.mark.timeout(180)
async def test_a_real_cluster_says_the_same_with_drafts_of_the_page_and_some_are_right(
    browser: Browser, cluster: LocalCluster
) -> None:
    page = await opened(browser, cluster.url, cluster.api_key)
    plain = await generate(page, REPETITIVE, 160)
    await page.get_by_label("Draft on this device").check()
    assert await generate(page, REPETITIVE, 160) == plain
    right, made = await drafts(page)
    assert 0 < right <= made
    again = await generate(page, REPETITIVE, 160)  # from what the first one said
    assert again == plain
    assert (await drafts(page))[0] > 0


@pytest.mark.cluster
@pytest.mark.timeout(180)
async def test_a_link_that_breaks_in_the_middle_of_a_real_request_changes_no_text(
    browser: Browser, cluster: LocalCluster
) -> None:
    page = await opened(browser, cluster.url, cluster.api_key)
    plain = await generate(page, REPETITIVE, 400)
    await page.get_by_label("Draft on this device").check()
    await page.evaluate(
        """() => {
          const timer = setInterval(() => {
            if (sockets.length && document.querySelector("#output span + span").textContent.length > 100) {
              clearInterval(timer);
              sockets[0].close();
            }
          }, 1);
        }"""
    )
    assert await generate(page, REPETITIVE, 400) == plain
    assert await page.evaluate("sockets.length") == 2
