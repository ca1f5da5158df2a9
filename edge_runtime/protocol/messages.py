"""Every message that may cross a link, in one closed table.

A message is a frozen dataclass. On the wire it is one msgpack frame `[protocol_version, tag, field, ...]` in field
order, followed by raw payload frames (rows, slice bytes) whose dtype and shape come from the receiver's own plan, never
from the sender. An unknown tag, a wrong field count, type, range or size is a ProtocolError; nothing is ever resolved
by name from received bytes. `codec.py` derives the checks from the annotations here; the limits below bound every list
and string.

Knows: what is said. Does not know: how it travels, or what the receiver does about it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edge_runtime.core import SamplingParams, Token
from edge_runtime.protocol.expert_messages import ExpertOutputs, ExpertRows, ExpertShare, ExpertsRefused

PROTOCOL_VERSION = 1

MAX_STRING_BYTES = 64 << 10
MAX_ITEMS = 1 << 20  # of one list (ids of a long prompt)
MAX_CONTROL_BYTES = 8 << 20  # of one encoded message, payload frames not counted
PAGE_NAME_BYTES = 16
NOBODY_ASKS = -1
HOLDS_EXPERTS = -1  # in place of a stage's number: a device without layers of its own (`expert_messages.py`)

# ---------------------------------------------------------------- pairing (enrolment listener, any key)


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


# ---------------------------------------------------------------- device and coordinator


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


@dataclass(frozen=True, slots=True)
class Ping:
    """Link probe. The answer carries a payload frame of `reply_bytes` bytes."""

    nonce: int
    reply_bytes: int


@dataclass(frozen=True, slots=True)
class Pong:
    nonce: int


@dataclass(frozen=True, slots=True)
class ProfileRequest:
    """Measure yourself on this bundle: fetch its manifest and one layer, time them, probe row invariance."""

    bundle: str


@dataclass(frozen=True, slots=True)
class ProfileReport:
    bundle: str
    numeric_class: str  # executor and version, ISA path, weight/KV/wire formats, kernel version
    row_invariant: bool
    layer_decode_seconds: float  # one row through one layer, mid context
    layer_prefill_row_seconds: float  # per row of a full chunk through one layer
    head_seconds: float  # one row through final norm, head and sampler
    memory_free_bytes: int  # of the budget, for weights and KV
    overhead_bytes: int  # the process without weights
    flash_bytes_per_second: float = 0.0  # of experts that stay on flash; 0: all must be in memory
    expert_cache_bytes: int = 0  # memory for those; 0: what weights and KV leave


# ---------------------------------------------------------------- bundle transfer (agent asks, coordinator serves)


@dataclass(frozen=True, slots=True)
class SliceRequest:
    """`slice` is a key of the manifest, or "manifest.json" / "manifest.sig". Resumes from `offset_bytes`."""

    bundle: str
    slice: str
    offset_bytes: int
    length_bytes: int  # at most MAX_CHUNK_BYTES


@dataclass(frozen=True, slots=True)
class SliceChunk:
    """Payload: the bytes. `total_bytes` is of the whole slice."""

    bundle: str
    slice: str
    offset_bytes: int
    total_bytes: int


MAX_CHUNK_BYTES = 1 << 20

# ---------------------------------------------------------------- plans


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
    stage holds all of them. Stage HOLDS_EXPERTS: compute the experts of one's own shares for the `devices`, no more.
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


# ---------------------------------------------------------------- sessions


@dataclass(frozen=True, slots=True)
class OpenSession:
    """Coordinator -> stage 1, then stage -> next stage ahead of the first frame, so that it can't be overtaken.

    Rows below `forced_rows` are given (prompt and journalled ids); the tail samples at row `forced_rows - 1` and on.
    `page_names` are what the leading full pages of these rows are called, PAGE_NAME_BYTES each (docs/prefix_cache.md);
    `held_rows` is how many of the rows the stages so far hold already (from the coordinator: how many they may reuse),
    or NOBODY_ASKS where stage 1 begins at row 0 without waiting for an answer (RowsHeld).
    """

    session: int
    lease: int
    forced_rows: int
    prompt_rows: int  # of the forced ones; penalties treat ids after it as generated
    max_rows: int  # prompt and everything that may be generated: reserve KV for it
    stop_ids: tuple[int, ...]
    sampling: SamplingParams
    tail: str  # "sampler" or "pooler"
    page_names: bytes = b""
    held_rows: int = NOBODY_ASKS


@dataclass(frozen=True, slots=True)
class Feed:
    """Coordinator -> stage 1: ids of rows base_row, base_row + 1, ... (a prompt, or journalled ids to re-feed)."""

    session: int
    lease: int
    base_row: int
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FrameRows:
    """Stage -> next stage. Payload: rows [len(ids), hidden] in the plan's wire format. The wire's hot path.

    A stage may pass a frame on in pieces: of the same `seq`, each from the row where the one before ended.

    `parents[i]` is the row that row `base_row + i` continues; a chain names the row before. Of guessed rows, side rows
    may follow the chain: run once, never held (docs/speculative.md); `ids` and rows have them last. A frame that
    continues a row below those a stage holds drops the rows after it: committing is choosing a parent. `seq` is issued
    by stage 1 alone, `lease` by the coordinator alone, `turn` is the position of the last wrong guess; older ones are
    dropped.
    """

    session: int
    lease: int
    turn: int
    seq: int
    base_row: int
    parents: tuple[int, ...]
    ids: tuple[int, ...]
    bidirectional: bool


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tail -> coordinator (journal, stream) and tail -> stage 1 (the ring turns on)."""

    session: int
    lease: int
    turn: int
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class RowsHeld:
    """Tail -> stage 1 (the way goes on) and coordinator (it goes on at all): every stage holds the rows below `rows`.

    `reused`: before any row is run, where stage 1 found rows of another session: it begins there. Later for prompt rows
    that have come through: stage 1 sends no more than a window beyond them; the coordinator hears of it now and then.
    """

    session: int
    lease: int
    rows: int
    reused: bool


@dataclass(frozen=True, slots=True)
class Draft:
    """Whoever drafts -> coordinator -> stage 1: guessed ids for positions `base_row` and on (docs/speculative.md).

    `turn` is the position of the last guess the sender knows to be wrong, 0 for none. `parents` as in FrameRows: the
    main chain first, then side rows.
    """

    session: int
    lease: int
    turn: int
    base_row: int
    parents: tuple[int, ...]
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fence:
    """Tail -> every other stage: rows of turns below `turn` are dead, and need not run any more."""

    session: int
    lease: int
    turn: int


@dataclass(frozen=True, slots=True)
class Pooled:
    """Pooling tail -> coordinator. Payload: float32 [hidden]."""

    session: int
    lease: int


@dataclass(frozen=True, slots=True)
class Gap:
    """A stage got a row it can't place: it holds rows below `wanted_row`. The coordinator re-feeds."""

    session: int
    lease: int
    wanted_row: int


@dataclass(frozen=True, slots=True)
class SessionFailed:
    session: int
    lease: int
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class CloseSession:
    """Coordinator -> every stage: free the session's KV now. Unknown sessions are ignored.

    `page_names` continue those of OpenSession: pages that hold exactly the rows of `ids` (PAGE_TOKENS to a name) are
    kept under them for other sessions.
    """

    session: int
    lease: int
    page_names: bytes = b""
    ids: tuple[int, ...] = ()


# ---------------------------------------------------------------- relay


@dataclass(frozen=True, slots=True)
class Relay:
    """Agent -> coordinator -> agent, where two devices can't reach each other. Payload: the inner frames.

    `peer` is the destination on the way in and the (proved) source on the way out.
    """

    peer: str
    lease: int


Message = (
    EnrollRequest
    | EnrollAccepted
    | Refused
    | Hello
    | Welcome
    | Heartbeat
    | Ping
    | Pong
    | ProfileRequest
    | ProfileReport
    | SliceRequest
    | SliceChunk
    | PeerLease
    | PeerLeaseBody
    | LoadStage
    | StageProgress
    | StageReady
    | StageFailed
    | UnloadStage
    | OpenSession
    | Feed
    | FrameRows
    | Tokens
    | RowsHeld
    | Draft
    | Fence
    | Pooled
    | Gap
    | SessionFailed
    | CloseSession
    | Relay
    | ExpertRows
    | ExpertOutputs
    | ExpertsRefused
)

# The closed table: tags are never reused or renumbered.
MESSAGE_TAGS: Mapping[int, type[Message]] = {
    1: EnrollRequest,
    2: EnrollAccepted,
    3: Refused,
    10: Hello,
    11: Welcome,
    12: Heartbeat,
    13: Ping,
    14: Pong,
    15: ProfileRequest,
    16: ProfileReport,
    20: SliceRequest,
    21: SliceChunk,
    30: PeerLease,
    31: PeerLeaseBody,
    32: LoadStage,
    33: StageProgress,
    34: StageReady,
    35: StageFailed,
    36: UnloadStage,
    40: OpenSession,
    41: Feed,
    42: FrameRows,
    43: Tokens,
    44: Pooled,
    45: Gap,
    46: SessionFailed,
    47: CloseSession,
    48: RowsHeld,
    49: Draft,
    51: Fence,
    50: Relay,
    60: ExpertRows,
    61: ExpertOutputs,
    62: ExpertsRefused,
}
