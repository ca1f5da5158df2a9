"""When the device may answer in the target's place: nobody is there, or nobody there can serve.

A refused request is an answer, and so is one that failed: neither is asked again of a smaller model.

Knows: codes of errors. Does not know: whether the caller allowed it, who answers then.
"""

from __future__ import annotations

from collections.abc import Mapping

from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.sdk.http import NoWebSocket

_FIRST_SERVER_STATUS = 500

UNREACHABLE: Mapping[str, str] = {
    "unreachable": "nothing listens, the name is unknown, or a gateway finds nobody behind it",
    "connection_closed": "the link broke, fell silent, or did not come back in time",
    "not_ready": "the coordinator is there, and has no plan or no device",
    "plan": "no plan satisfies its constraints",
    "engine": "a stage can't be loaded",
    "transport": "its links to the devices are down",
}
"""Codes of errors after which another may answer, and what each means."""


def is_unreachable(problem: EdgeRuntimeError) -> bool:
    """Whether the target could not be asked: True for these codes and for no other."""
    if isinstance(problem, NoWebSocket):  # a handshake says no more than a status
        return problem.status >= _FIRST_SERVER_STATUS
    return problem.code in UNREACHABLE
