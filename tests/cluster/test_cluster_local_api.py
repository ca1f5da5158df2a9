"""Real processes: a plain HTTP client asks this device, which drafts; what is left when the coordinator goes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_runtime import Client, DeviceSpec, LocalCluster
from tests.support.copied_code import COPIED_CODE

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

DEMO = Path(__file__).parents[2] / "edge_runtime" / "demo" / "bundle"
PROMPT = COPIED_CODE
GREEDY = {"temperature": 0.0, "max_tokens": 160, "ignore_eos": True}
SAMPLED = {"temperature": 0.7, "seed": 7, "max_tokens": 160, "ignore_eos": True}


@contextlib.contextmanager
def running(*arguments: str, event: str = "local_api") -> Iterator[dict[str, Any]]:
    """A command of ours, from the first line of its JSON with that event; ended by SIGTERM, which it must obey."""
    command = [sys.executable, "-m", "edge_runtime.cli", *arguments, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            said = map(json.loads, process.stdout)
            yield next(each for each in said if each.get("event") == event)
        finally:
            process.terminate()
            process.wait(timeout=30)
    assert process.returncode == 0


def ask(url: str, key: str, options: dict[str, Any]) -> dict[str, Any]:
    body = {"model": "demo", "prompt": PROMPT, "return_token_ids": True, **options}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.loads(answer.read())
        return found


def ids_of(answer: dict[str, Any]) -> list[int]:
    ids: list[int] = answer["choices"][0]["token_ids"]
    return ids


def test_a_plain_client_gets_the_same_ids_sooner_guessed_and_the_draft_s_when_nobody_is_left(
    tmp_path: Path,
) -> None:
    """The draft model is the target itself: what it answers alone must be what the target answered."""
    choices = (GREEDY, SAMPLED)
    with contextlib.ExitStack() as stack:
        with LocalCluster(
            DEMO, devices=[DeviceSpec(name="a"), DeviceSpec(name="b")], split="even"
        ) as cluster:
            url, key = cluster.url, cluster.api_key
            flags = ["--draft", str(DEMO), "--offline", "draft"]
            near = stack.enter_context(running("draft", "--listen", "127.0.0.1:0", "--url", url, *flags))[
                "url"
            ]
            client = stack.enter_context(Client(url, api_key=key, draft=DEMO, offline="draft"))
            agent = ["agent", "--name", "c", "--state", str(tmp_path), "--memory", "512MiB", "--threads", "1"]
            join = ["--join", cluster.client().create_join_link(), "--local-api", "127.0.0.1:0"]
            helper = stack.enter_context(running(*agent, *join, "--url", url, "--draft", "suffix"))["url"]
            direct = [ask(url, key, options) for options in choices]
            for place in (near, helper):
                through = [ask(place, key, options) for options in choices]
                assert [each["choices"] for each in through] == [each["choices"] for each in direct]
                assert all("edge_runtime" not in each for each in through)
                accepted = [each["usage"].get("completion_tokens_details") for each in through]
                assert place == near or all(each["accepted_prediction_tokens"] > 0 for each in accepted)
            told = [client.generate(PROMPT, **options) for options in choices]
        alone = [ask(near, key, options) for options in choices]
        drawn = [client.generate(PROMPT, **options) for options in choices]
    assert [ids_of(each) for each in alone] == [ids_of(each) for each in direct]
    assert [each["edge_runtime"]["answered_by"] for each in alone] == ["draft", "draft"]
    assert [each.answered_by for each in told] == ["target", "target"]
    assert [each.answered_by for each in drawn] == ["draft", "draft"]
    assert [each.token_ids for each in drawn] == [each.token_ids for each in told]
    assert [each.text for each in drawn] == [each.text for each in told]
