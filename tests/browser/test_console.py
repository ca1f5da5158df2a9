"""The console in real Chromium: what a person does there, and what a hostile page cannot."""

from __future__ import annotations

import asyncio
from hashlib import sha256

import pytest
from aiohttp import web
from playwright.async_api import Browser, expect

from coordinator.api.app import serve
from coordinator.service import PlanStatus
from tests.support.api_server import ADMIN_KEY, Server
from tests.support.chromium import watch

pytestmark = pytest.mark.browser


async def test_a_person_runs_the_cluster_from_the_console(browser: Browser, server: Server):
    page = await browser.new_page(viewport={"width": 1400, "height": 900})
    errors, hosts = watch(page)
    await page.goto(server.url)

    await page.get_by_label("API key").fill("sk-edge-wrong-0000000000")
    await page.keyboard.press("Enter")
    await expect(page.locator("#login-error")).to_contain_text("valid API key")
    errors.clear()  # the browser itself notes the 401
    await page.get_by_label("API key").fill(ADMIN_KEY)
    await page.get_by_role("button", name="Open").click()

    await expect(page.get_by_role("status").filter(has_text="serving").first).to_be_visible()
    await expect(page.locator("#model")).to_contain_text("tiny")
    pipeline = page.get_by_role("img", name="Pipeline: phone runs layers 0–1, then laptop runs layers 2–3")
    await expect(pipeline).to_be_visible()
    await expect(page.locator("#rates")).to_contain_text("42.0 tok/s")
    await expect(page.locator("#rates")).to_contain_text("40.5 tok/s")
    await expect(page.locator("#reasons")).to_contain_text("two devices are faster than one")
    await expect(page.locator("#devices li")).to_have_count(3)
    await expect(page.locator("#devices")).to_contain_text("it would slow the pipeline")

    await page.get_by_label("Prompt").fill("hi <b>there</b>")
    await page.get_by_role("spinbutton", name="Tokens").fill("40")
    await page.get_by_role("button", name="Generate").click()
    await expect(page.locator("#output-note")).to_contain_text("40 tokens")
    text = await page.locator("#output").inner_text()
    assert text.startswith("hi <b>there</b>")
    assert len(text) == len("hi <b>there</b>") + 40

    await page.get_by_role("button", name="Add a device").click()
    await expect(page.get_by_label("Command")).to_have_value(
        "edge-runtime agent --join 'edge://127.0.0.1:7001/?enroll=7002&key=abc&token=token1'"
    )
    await expect(page.get_by_role("img", name="The link as a QR code")).to_be_visible()
    await page.keyboard.press("Escape")

    await page.get_by_role("button", name="Revoke old-tablet").click()
    await page.get_by_role("button", name="Keep it").click()
    assert server.service.revoked == []
    await page.get_by_role("button", name="Revoke laptop").click()
    await page.get_by_role("button", name="Revoke", exact=True).last.click()
    await expect(page.locator("#devices li", has_text="laptop").locator(".state")).to_have_text("revoked")

    assert errors == []
    assert hosts == {f"127.0.0.1:{server.port}"}


async def test_every_pipeline_is_drawn_with_its_layers_rates_and_reasons(browser: Browser, server: Server):
    server.service.replicas = (
        PlanStatus(4, False, "auto", (("old-tablet", 0, 3),), 9.0, 0.0, ("it stood by",)),
    )
    page = await browser.new_page(viewport={"width": 1400, "height": 900})
    errors, _ = watch(page)
    await page.goto(f"{server.url}/#key={ADMIN_KEY}")
    await expect(page.get_by_role("img", name="Pipeline: phone runs layers 0–1, then laptop")).to_be_visible()
    await expect(page.get_by_role("img", name="Pipeline: old-tablet runs layers 0–3")).to_be_visible()
    await expect(page.locator("#lease")).to_have_text("2 pipelines, leases 3; 4, not ready")
    await expect(page.locator("#rates")).to_contain_text("9.0 tok/s")
    await expect(page.locator("#reasons")).to_contain_text("pipeline 2: it stood by")
    await expect(page.locator(".layers span")).to_have_count(8)
    assert errors == []


async def test_a_running_request_is_shown_and_can_be_stopped(browser: Browser, server: Server):
    server.service.hold = hold = asyncio.Event()
    page = await browser.new_page()
    await page.goto(f"{server.url}/#key={ADMIN_KEY}")
    await page.get_by_role("button", name="Generate").click()
    await expect(page.locator("#requests tbody tr")).to_have_count(1)
    await page.get_by_role("button", name="Stop").click()
    await expect(page.locator("#output-note")).to_have_text("stopped")
    await server.service.all_closed.wait()
    assert not hold.is_set()


@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_it_fits_a_phone_and_a_desk(browser: Browser, server: Server, width: int, scheme):
    context = await browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = await context.new_page()
    await page.goto(f"{server.url}/#key={ADMIN_KEY}")
    await expect(page.locator("#devices li")).to_have_count(3)
    assert page.url == f"{server.url}/"  # the key does not stay in the address
    assert await page.evaluate("document.documentElement.scrollWidth") <= width
    assert await page.evaluate("sessionStorage.length") == 1
    assert await page.evaluate("localStorage.length + document.cookie.length") == 0
    await page.reload()
    await expect(page.locator("#devices li")).to_have_count(3)
    await context.close()


async def test_the_code_of_a_link_is_the_standards(browser: Browser, server: Server):
    """A full version 4 code, whose every bit was compared with an independent encoder's."""
    page = await browser.new_page()
    await page.goto(server.url)
    rows = await page.evaluate(
        "async () => (await import('/console/qr.js')).encode('q'.repeat(78), 5).map(row => row.join(''))"
    )
    assert len(rows) == 33
    assert (
        sha256("".join(rows).encode()).hexdigest()
        == "d527350191d85fbd45fb647d39b0f8129aa49ef349e93d17743fa3e2a36181ad"
    )
    assert await page.evaluate("async () => (await import('/console/qr.js')).encode('q'.repeat(500))") is None


HOSTILE = """<!doctype html><script>
const target = new URLSearchParams(location.search).get("target");
(async () => {
  const results = [];
  for (const method of ["GET", "HEAD", "POST", "PUT", "DELETE"])
    for (const mode of ["cors", "no-cors"])
      for (const path of ["/admin/status", "/admin/join-links", "/v1/models", "/health", "/admin/devices/phone/revoke"])
        try {
          const response = await fetch(target + path, { method, mode, credentials: "include" });
          results.push(response.type === "opaque" ? "opaque" : "read");
        } catch { results.push("refused"); }
  document.title = results.includes("read") ? "read something" : "read nothing";
})();
</script>"""


async def test_a_hostile_page_reads_and_changes_nothing(browser: Browser, server: Server):
    async def page_of_somebody_else(_request: web.Request) -> web.Response:
        return web.Response(text=HOSTILE, content_type="text/html")

    app = web.Application()
    app.router.add_get("/", page_of_somebody_else)
    runner, port = await serve(app)
    try:
        page = await browser.new_page()
        for host in ("127.0.0.1", "localhost"):
            await page.goto(f"http://{host}:{port}/?target={server.url}")
            await expect(page).to_have_title("read nothing")
    finally:
        await runner.cleanup()
    assert (server.service.links, server.service.revoked, server.service.probes) == (0, [], 0)
