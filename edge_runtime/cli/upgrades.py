"""What a person sees when the target can be asked again for what the draft model answered.

Knows: waiting, and how two answers are compared in words. Does not know: how either was made.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from edge_runtime.cli.answers import DRAFT, note_speed
from edge_runtime.cli.output import note, result
from edge_runtime.errors import TransportError

if TYPE_CHECKING:
    from edge_runtime.sdk.client import Client
    from edge_runtime.sdk.results import Result, Upgrade

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 5.0


def is_ready(client: Client) -> bool:
    """Whether the target can be asked now."""
    try:
        client.ready()
    except TransportError:
        return False
    return True


def wait_until_ready(client: Client, sleep: Callable[[float], None] = time.sleep) -> None:
    """Until the target can be asked, or Ctrl-C."""
    pause = FIRST_PAUSE_SECONDS
    while not is_ready(client):
        sleep(pause)
        pause = min(pause * 2, LONGEST_PAUSE_SECONDS)


def offer_upgrade(client: Client, answer: Result) -> None:
    """Of the draft model's answer. On a terminal: wait for the link, then ask whether to ask the target."""
    if answer.answered_by != DRAFT:
        return
    if not sys.stdin.isatty():
        note(f"hint: once the coordinator is back, the same with --seed {answer.seed} asks the target")
        return
    note("waiting for the coordinator, to ask the target the same; Ctrl-C ends")
    wait_until_ready(client)
    note("the target can be asked again. Ask it now? [Y/n] ", end="")
    if sys.stdin.readline().strip().lower() in ("", "y", "yes"):
        upgrade = client.upgrade(answer)
        result(upgrade.result.text)
        note_speed(upgrade.result)
        note_upgrade(upgrade, answer)


def note_upgrade(upgrade: Upgrade, draft: Result) -> None:
    note(difference(upgrade.first_difference, len(draft.token_ids)))


def difference(first: int | None, draft_tokens: int) -> str:
    if first is None:
        return f"the target says the same: all {draft_tokens} tokens"
    return f"the target says something else from token {first} of {draft_tokens} on"
