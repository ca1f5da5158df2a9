"""Every message that may cross a link, in one closed table.

A message is a frozen dataclass. On the wire it is one msgpack frame `[protocol_version, tag, field, ...]` in field
order, followed by raw payload frames (rows, slice bytes) whose dtype and shape come from the receiver's own plan, never
from the sender. An unknown tag, a wrong field count, type, range or size is a ProtocolError; nothing is ever resolved
by name from received bytes. `codec.py` derives the checks from the annotations; the limits below bound every list and
string. The messages themselves are in the `*_messages.py` beside this module and are imported from here.

Knows: what is said. Does not know: how it travels, or what the receiver does about it.
"""

from __future__ import annotations

from collections.abc import Mapping

from edge_runtime.protocol.bundle_messages import (
    MAX_CHUNK_BYTES,
    ProfileReport,
    ProfileRequest,
    SliceChunk,
    SliceRequest,
)
from edge_runtime.protocol.expert_messages import ExpertOutputs, ExpertRows, ExpertsRefused
from edge_runtime.protocol.link_messages import (
    EnrollAccepted,
    EnrollRequest,
    Heartbeat,
    Hello,
    Ping,
    Pong,
    Refused,
    Relay,
    Welcome,
)
from edge_runtime.protocol.plan_messages import (
    HOLDS_EXPERTS,
    LoadStage,
    PeerEntry,
    PeerLease,
    PeerLeaseBody,
    StageFailed,
    StageProgress,
    StageReady,
    UnloadStage,
)
from edge_runtime.protocol.session_messages import (
    NOBODY_ASKS,
    PAGE_NAME_BYTES,
    CloseSession,
    Draft,
    Feed,
    Fence,
    FrameRows,
    Gap,
    OpenSession,
    Pooled,
    RowsHeld,
    SessionFailed,
    StepRows,
    StepTokens,
    Tokens,
)

__all__ = [
    "HOLDS_EXPERTS",
    "MAX_CHUNK_BYTES",
    "MAX_CONTROL_BYTES",
    "MAX_ITEMS",
    "MAX_STRING_BYTES",
    "MESSAGE_TAGS",
    "NOBODY_ASKS",
    "PAGE_NAME_BYTES",
    "PROTOCOL_VERSION",
    "CloseSession",
    "Draft",
    "EnrollAccepted",
    "EnrollRequest",
    "ExpertOutputs",
    "ExpertRows",
    "ExpertsRefused",
    "Feed",
    "Fence",
    "FrameRows",
    "Gap",
    "Heartbeat",
    "Hello",
    "LoadStage",
    "Message",
    "OpenSession",
    "PeerEntry",
    "PeerLease",
    "PeerLeaseBody",
    "Ping",
    "Pong",
    "Pooled",
    "ProfileReport",
    "ProfileRequest",
    "Refused",
    "Relay",
    "RowsHeld",
    "SessionFailed",
    "SliceChunk",
    "SliceRequest",
    "StageFailed",
    "StageProgress",
    "StageReady",
    "StepRows",
    "StepTokens",
    "Tokens",
    "UnloadStage",
    "Welcome",
]

PROTOCOL_VERSION = 3

MAX_STRING_BYTES = 64 << 10
MAX_ITEMS = 1 << 20  # of one list (ids of a long prompt)
MAX_CONTROL_BYTES = 8 << 20  # of one encoded message, payload frames not counted

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
    | StepRows
    | StepTokens
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
    50: Relay,
    51: Fence,
    52: StepRows,
    53: StepTokens,
    60: ExpertRows,
    61: ExpertOutputs,
    62: ExpertsRefused,
}
