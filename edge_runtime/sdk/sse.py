"""Server-sent events out of chunks of bytes that are cut anywhere.

Knows: the format's lines, fields and line ends. Does not know: what events mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edge_runtime.errors import ProtocolError

MAX_EVENT_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class ServerEvent:
    data: str
    id: str  # "" where the event has none of its own
    name: str


class SseParser:
    """`for event in parser.feed(chunk)`. What is incomplete waits for the next chunk; comments are skipped."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []
        self._id = ""
        self._name = ""
        self._size_bytes = 0

    def feed(self, chunk: bytes) -> Iterator[ServerEvent]:
        self._rest += chunk
        # A chunk may end between \r and \n: that \r waits, or the \n would count as an empty line.
        held = b"\r" if self._rest.endswith(b"\r") else b""
        whole = self._rest[: len(self._rest) - len(held)]
        lines = whole.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = lines.pop() + held
        self._check_size(len(self._rest))
        for line in lines:
            event = self._line(line)
            if event is not None:
                yield event

    def _line(self, line: bytes) -> ServerEvent | None:
        if not line:
            return self._dispatch()
        field, _, raw = line.decode("utf-8", "replace").partition(":")
        value = raw.removeprefix(" ")
        if field == "data":
            self._data.append(value)
            self._size_bytes += len(line)
            self._check_size(self._size_bytes)
        elif field == "id":
            self._id = value
        elif field == "event":
            self._name = value
        return None

    def _dispatch(self) -> ServerEvent | None:
        event = ServerEvent("\n".join(self._data), self._id, self._name) if self._data else None
        self._data, self._id, self._name, self._size_bytes = [], "", "", 0
        return event

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > MAX_EVENT_BYTES:
            raise ProtocolError(f"the server sent an event of more than {MAX_EVENT_BYTES} bytes")
