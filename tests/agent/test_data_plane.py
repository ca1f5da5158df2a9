"""Frames and rows share memory; a step's events are handled where they happen; the thread outlives a job that fails."""

from __future__ import annotations

import asyncio
import threading

import numpy as np

from edge_runtime.agent.pipeline_events import Work, WorkFinished
from edge_runtime.agent.stage_worker import StageWorker
from edge_runtime.agent.step_batch import batch_of, split_rows
from edge_runtime.core import SessionId
from edge_runtime.engine.wire import FP32, packed, unpacked
from edge_runtime.protocol import codec
from edge_runtime.protocol.messages import FrameRows
from edge_runtime.transport import zeromq
from edge_runtime.trust.admission import Admission
from edge_runtime.trust.identity import KeyPair

HIDDEN = 512


def work(rows: int, hidden: np.ndarray | None = None) -> Work:
    return Work(1, SessionId(1), 0, 1, 0, tuple(range(rows)), hidden, 0, False)


def frame(rows: int) -> FrameRows:
    return FrameRows(1, 1, 0, 1, 0, tuple(range(-1, rows - 1)), tuple(range(rows)), False)


def test_the_result_of_a_step_is_what_is_sent() -> None:
    result = np.arange(3 * HIDDEN, dtype=np.float32).reshape(3, HIDDEN)
    events = split_rows([work(1), work(2)], result)
    for event in events:
        assert isinstance(event, WorkFinished)
        assert event.rows is not None
        sent = codec.encode(frame(len(event.rows)), [packed(event.rows, FP32)])[1]
        assert np.shares_memory(np.frombuffer(sent, np.float32), result)


async def test_what_is_received_is_what_the_engine_gets() -> None:
    key = KeyPair.generate()
    listener = await zeromq.listen("tcp://127.0.0.1:0", key, Admission([key.public]))
    near = await zeromq.connect(listener.address, key, key.public)
    far = await listener.accept()
    rows = np.random.default_rng(1).standard_normal((40, HIDDEN), np.float32)
    await near.send(codec.encode(frame(40), [packed(rows, FP32)]))
    message, payloads = codec.decode(await far.receive())
    assert isinstance(message, FrameRows)
    received = unpacked(payloads[0], FP32, 40, HIDDEN)
    assert received is not None
    batch = batch_of([work(40, received)])
    assert np.shares_memory(batch.hidden, np.frombuffer(payloads[0], np.uint8))
    assert not received.flags.writeable  # nobody changes a frame that somebody else may still read
    np.testing.assert_array_equal(received, rows)
    await near.close()
    await listener.close()


def test_the_compute_thread_survives_a_job_that_fails_and_ends_what_ran_beside_it() -> None:
    worker = StageWorker(lambda events: None)
    worker.start()
    began, ended, done = threading.Event(), threading.Event(), threading.Event()

    async def link() -> None:
        began.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.set()

    worker.beside(link())
    assert began.wait(10)
    errors: list[object] = []
    worker.put(
        lambda: asyncio.get_running_loop().set_exception_handler(lambda loop, what: errors.append(what))
    )
    worker.put(lambda: [][0])
    worker.put(done.set)
    assert done.wait(10)
    assert len(errors) == 1
    assert worker.stop()
    assert ended.is_set()


def test_a_worker_that_never_started_leaves_nothing() -> None:
    assert StageWorker(lambda events: None).stop()
