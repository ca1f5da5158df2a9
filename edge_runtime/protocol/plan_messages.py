"""Who holds what, and who may talk to whom: part of the closed table in `messages.py`.

Knows: what is said. Does not know: how it travels, or why it was planned so.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.protocol.expert_messages import ExpertShare

HOLDS_EXPERTS = -1  # in place of a stage's number: a device without layers of its own (`expert_messages.py`)


@dataclass(frozen=True, slots=True)
class PeerEntry:
    device_id: str
    public_key: bytes
    address: str  # "" : only through the relay


@dataclass(frozen=True, slots=True)
class PeerLease:
    """Who may use this agent's data port, and where its peers are: a signed, numbered list replaces the last one.

    `body` is the codec's encoding of PeerLeaseBody; `signature` Ed25519 by the coordinator's signing key over it.
    """

    body: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class PeerLeaseBody:
    number: int  # a lower number than the last seen is refused
    device_id: str  # whom this lease is for
    peers: tuple[PeerEntry, ...]


@dataclass(frozen=True, slots=True)
class LoadStage:
    """Become stage `stage` of the pipeline `lease`. Everything of an older lease is fenced off from now on.

    `devices` lists the pipeline's device ids in order; the next stage is devices[stage + 1], the tail's ring goes to
    devices[0]. Layers already loaded are kept. `shares` say who holds the experts of these layers; without any the
    stage holds all of them. `experts_on_flash`: it does, on its flash, and `shares` say who else has which of them in
    memory. Stage HOLDS_EXPERTS: compute the experts of one's own shares for the `devices`, no more.
    """

    lease: int
    bundle: str
    stage: int
    devices: tuple[str, ...]
    first_layer: int
    last_layer: int
    prefill_chunk_tokens: int
    wire: str = "fp32"  # of rows between layers, and so of frames: fp32, fp16, int8
    kv: str = "fp32"  # of keys and values in memory: fp32, int8
    shares: tuple[ExpertShare, ...] = ()
    experts_on_flash: bool = False


@dataclass(frozen=True, slots=True)
class StageProgress:
    lease: int
    activity: str  # "fetching", "checking", "loading"
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class StageReady:
    lease: int
    numeric_class: str
    row_invariant: bool
    weight_bytes: int
    kv_capacity_tokens: int


@dataclass(frozen=True, slots=True)
class StageFailed:
    lease: int
    code: str
    reason: str
    hint: str


@dataclass(frozen=True, slots=True)
class UnloadStage:
    """The pipeline `lease` is over for this device: free its sessions and weights."""

    lease: int
