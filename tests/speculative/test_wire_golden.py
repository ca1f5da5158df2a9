"""The frames of the device's link, frozen: what an end in another language, or of another version, makes and reads."""

from __future__ import annotations

import json
from pathlib import Path

from edge_runtime.speculative.wire import (
    CommittedDecoder,
    CommittedEncoder,
    CommittedFrame,
    DraftDecoder,
    DraftEncoder,
    chain_frame,
)

VECTORS = json.loads(Path(__file__).with_name("wire_golden.json").read_text())
MAX_ROWS = 1 << 20


def test_drafts_are_golden_both_ways() -> None:
    for vector in VECTORS:
        encoder = DraftEncoder(vector["vocabulary"])
        decoder = DraftDecoder(vector["vocabulary"], MAX_ROWS)
        for turn, base_row, ids, data in vector["drafts"]:
            frame = chain_frame(turn, base_row, tuple(ids))
            assert encoder.encode(frame).hex() == data
            assert decoder.decode(bytes.fromhex(data)) == frame


def test_committed_ids_are_golden_both_ways() -> None:
    for vector in VECTORS:
        encoder, decoder = CommittedEncoder(vector["vocabulary"]), CommittedDecoder(vector["vocabulary"])
        for position, ids, finish, data in vector["committed"]:
            frame = CommittedFrame(position, tuple(ids), finish)
            assert encoder.encode(frame).hex() == data
            assert decoder.decode(bytes.fromhex(data)) == frame
