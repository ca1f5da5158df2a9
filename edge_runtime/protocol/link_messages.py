"""How a device joins, and what it and the coordinator say to keep a link: part of the closed table in `messages.py`.

Knows: what is said. Does not know: how it travels, or whom to admit.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EnrollRequest:
    """First and only message on the enrolment link. The device's key is the one the handshake proved."""

    token: str
    device_name: str


@dataclass(frozen=True, slots=True)
class EnrollAccepted:
    device_id: str
    coordinator_address: str
    signing_key: bytes  # Ed25519 public key of the coordinator: peer leases and bundles


@dataclass(frozen=True, slots=True)
class Refused:
    """Why the sender will not go on. `code` is stable; `reason` and `hint` are for a person."""

    code: str
    reason: str
    hint: str


@dataclass(frozen=True, slots=True)
class Hello:
    """An agent's first message on every connection."""

    protocol_version: int
    software_version: str
    device_name: str
    boot_id: str  # new at every start of the agent: a rejoin replaces, it never counts twice
    data_address: str  # where peers may dial this agent; "" for nowhere (browser, NAT): use the relay
    memory_budget_bytes: int  # of the whole process
    threads: int
    pid: int  # for a person who looks for the process; 0 where there is none


@dataclass(frozen=True, slots=True)
class Welcome:
    device_id: str
    heartbeat_seconds: float
    timeout_seconds: float  # silence after which either side gives the other up


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Every `heartbeat_seconds`, from the agent's event loop; `steps` moves when the compute thread does."""

    sequence: int
    steps: int
    sessions: int
    kv_tokens: int
    rss_bytes: int
    row_seconds: float = 0.0  # of a step with one decoded row, lately; 0: there were none under this lease
    round_seconds: float = 0.0  # from such a step to the next one of the same session, likewise


@dataclass(frozen=True, slots=True)
class Ping:
    """Link probe. The answer carries a payload frame of `reply_bytes` bytes."""

    nonce: int
    reply_bytes: int


@dataclass(frozen=True, slots=True)
class Pong:
    nonce: int


@dataclass(frozen=True, slots=True)
class Relay:
    """Agent -> coordinator -> agent, where two devices can't reach each other. Payload: the inner frames.

    `peer` is the destination on the way in and the (proved) source on the way out.
    """

    peer: str
    lease: int
