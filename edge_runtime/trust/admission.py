"""Who may connect: lists of public keys, and the handler libzmq asks during every CURVE handshake.

CURVE lets everybody in when nobody answers its question, so the rules here are: one handler thread per process
answers for all listeners; each listener has a domain of its own, never empty, and enforces it; whatever goes wrong in
the handler is a "no"; the thread is restarted if it dies, and while it is away libzmq refuses.

Knows: keys, domains, the ZAP protocol. Does not know: messages, tokens, or why a key was admitted or revoked.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol

import zmq

from edge_runtime.core import DeviceId
from edge_runtime.errors import TrustError
from edge_runtime.trust.identity import KEY_BYTES, device_id

log = logging.getLogger(__name__)

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"
_RESTART_SECONDS = 0.05
_MAX_SOCKETS = 8192
_LOG_EVERY_SECONDS = 1.0


class Gate(Protocol):
    """What a listener asks before it reads a byte of a peer, and again for every list of frames it delivers."""

    def is_allowed(self, public_key: bytes) -> bool: ...

    def subscribe(self, on_revoked: Callable[[bytes], None]) -> Callable[[], None]: ...


class Admission:
    """The keys that may use a listener. Change it on the event loop's thread; the handler thread only looks keys up."""

    def __init__(self, public_keys: Iterable[bytes] = ()) -> None:
        self._allowed: dict[bytes, DeviceId] = {}
        self._subscribers: list[Callable[[bytes], None]] = []
        for public_key in public_keys:
            self.allow(public_key)

    def allow(self, public_key: bytes) -> DeviceId:
        if len(public_key) != KEY_BYTES:
            raise TrustError(f"a public key has {KEY_BYTES} bytes, not {len(public_key)}")
        name = device_id(public_key)
        self._allowed[bytes(public_key)] = name
        return name

    def revoke(self, public_key: bytes) -> None:
        """Forget the key and cut its live connections. Unknown keys are ignored."""
        if self._allowed.pop(bytes(public_key), None) is not None:
            for on_revoked in tuple(self._subscribers):
                on_revoked(bytes(public_key))

    def is_allowed(self, public_key: bytes) -> bool:
        return public_key in self._allowed

    def public_keys(self) -> frozenset[bytes]:
        return frozenset(self._allowed)

    def subscribe(self, on_revoked: Callable[[bytes], None]) -> Callable[[], None]:
        """Call `on_revoked(public_key)` at every revocation, until the returned function is called."""
        self._subscribers.append(on_revoked)
        return lambda: self._subscribers.remove(on_revoked)


class AnyKey:
    """Admits every key: for the enrolment listener alone, whose peers have no registered key yet."""

    def is_allowed(self, public_key: bytes) -> bool:
        return len(public_key) == KEY_BYTES

    def subscribe(self, on_revoked: Callable[[bytes], None]) -> Callable[[], None]:
        del on_revoked  # nothing is ever revoked here
        return lambda: None


class ZapHandler:
    """Answers the CURVE handshakes of one zmq context, on a thread of its own.

    A thread, because a busy event loop must not keep honest devices waiting until their handshake times out. It looks a
    key up and answers; it does no input or output besides.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._context = context
        self._gates: dict[bytes, Gate] = {}
        self._numbers = itertools.count(1)
        self._last_logged = -_LOG_EVERY_SECONDS
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="zap", daemon=True)
        self._thread.start()
        self._ready.wait(5)

    def register(self, name: str, gate: Gate) -> bytes:
        """A new domain for one listener; handshakes in it are decided by `gate`."""
        domain = f"{name}-{next(self._numbers)}".encode()
        self._gates[domain] = gate
        return domain

    def unregister(self, domain: bytes) -> None:
        self._gates.pop(domain, None)

    def decide(self, domain: bytes, mechanism: bytes, credentials: list[bytes]) -> bytes | None:
        """The admitted public key, or None."""
        gate = self._gates.get(domain)
        if gate is None or mechanism != b"CURVE" or len(credentials) != 1 or len(credentials[0]) != KEY_BYTES:
            return None
        return credentials[0] if gate.is_allowed(credentials[0]) else None

    def answer(self, request: list[bytes]) -> list[bytes]:
        """The reply to one ZAP request. Every error is a refusal."""
        version, request_id = [*request, b"", b""][:2]
        admitted: bytes | None = None
        try:
            if version == b"1.0" and len(request) >= 6:
                admitted = self.decide(domain=request[2], mechanism=request[5], credentials=request[6:])
        except Exception:
            # The one place where everything is caught: an error in a gate must not admit, nor silence the handler.
            log.exception("a handshake could not be decided and was refused")
        if admitted is None:
            self._log_refusal(request)
            return [b"1.0", request_id, b"400", b"this key is not admitted", b"", b""]
        return [b"1.0", request_id, b"200", b"OK", admitted.hex().encode(), b""]

    def _log_refusal(self, request: list[bytes]) -> None:
        """For whoever wonders why a device does not appear. A stranger who keeps knocking must not fill the log."""
        now = time.monotonic()
        if now - self._last_logged < _LOG_EVERY_SECONDS:
            return
        self._last_logged = now
        remote = request[3].decode("ascii", "replace") if len(request) > 3 else "somewhere"
        key = request[6] if len(request) == 7 else b""
        log.warning(
            "refused device %s from %s: its key is not admitted here", device_id(key) if key else "?", remote
        )

    def _supervise(self) -> None:
        while not self._context.closed:
            try:
                self._serve()
            except zmq.ContextTerminated:
                return
            except Exception:
                log.exception(
                    "the admission handler stopped and is started again; nobody is admitted meanwhile"
                )
                time.sleep(_RESTART_SECONDS)

    def _serve(self) -> None:
        socket = self._context.socket(zmq.ROUTER)
        try:
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(_ZAP_ENDPOINT)
            self._ready.set()
            while True:
                parts = socket.recv_multipart()
                split = parts.index(b"") + 1 if b"" in parts else len(parts)
                socket.send_multipart([*parts[:split], *self.answer(parts[split:])])
        finally:
            socket.close(0)


_runtime: tuple[int, zmq.Context[zmq.Socket[bytes]], ZapHandler] | None = None
_runtime_lock = threading.Lock()


def zmq_runtime() -> tuple[zmq.Context[zmq.Socket[bytes]], ZapHandler]:
    """The process's zmq context with its handler: made at first use, kept until the process ends.

    They are never torn down: a context whose handler has gone would be one that can't tell friends from strangers.
    """
    global _runtime
    with _runtime_lock:
        if _runtime is None or _runtime[0] != os.getpid():  # a forked child must not use its parent's sockets
            if zmq.zmq_version_info() < (4, 3, 5) or not zmq.has("curve"):
                raise TrustError(
                    "libzmq 4.3.5 or newer with CURVE is needed", hint="pip install --upgrade pyzmq"
                )
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
            context.set(zmq.MAX_SOCKETS, _MAX_SOCKETS)
            _runtime = (os.getpid(), context, ZapHandler(context))
        return _runtime[1], _runtime[2]
