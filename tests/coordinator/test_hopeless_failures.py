"""A failure that another try would only repeat ends the request at once, and says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.errors import RequestFailed
from edge_runtime.protocol.messages import OpenSession, SessionFailed
from tests.support.coordinator_world import collect, request, world


async def test_rows_that_a_wire_format_has_no_room_for(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.serve("a", "b")
        opened: list[OpenSession] = []

        def answer(opening: OpenSession, feed: object) -> SessionFailed:
            opened.append(opening)
            return SessionFailed(opening.session, opening.lease, "wire_overflow", "a hidden row holds 70000")

        w.cluster.answer = answer
        with pytest.raises(RequestFailed, match="holds 70000") as caught:
            await collect(w.runtime.generate(request()))
        assert "--wire fp32" in caught.value.hint
        assert len(opened) == 1
