"""Which plan is in force on a device: the one of the highest lease seen, until it is unloaded or lost.

Knows: leases, loading, and what the coordinator is told of it. Does not know: sessions (`pipeline_state`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from edge_runtime.agent.pipeline_events import (
    COORDINATOR,
    Ignore,
    Instruction,
    Load,
    Loaded,
    LoadFailed,
    Retire,
    Send,
    Unload,
)
from edge_runtime.protocol.messages import HOLDS_EXPERTS, LoadStage, StageFailed, StageReady, UnloadStage


class LeaseState(ABC):
    def __init__(self) -> None:
        self.lease = 0  # highest seen; survives UnloadStage, as a fence
        self.order: LoadStage | None = None  # of `lease`, None once unloaded
        self.loaded: Loaded | None = None  # of `lease`
        self.failed: LoadFailed | None = None  # of `lease`

    @abstractmethod
    def _forget_sessions(self) -> None: ...

    def _forget(self) -> None:
        self.order = self.loaded = self.failed = None
        self._forget_sessions()

    def _control_lost(self) -> list[Instruction]:
        """The coordinator gives the plan up at that moment, too."""
        if self.order is None:
            return []
        self._forget()
        return [Retire(self.lease)]

    @property
    def _stage(self) -> int:
        assert self.order is not None
        return self.order.stage

    @property
    def _stages(self) -> int:
        assert self.order is not None
        return len(self.order.devices)

    @property
    def is_first(self) -> bool:
        return self.order is not None and self.order.stage == 0

    @property
    def is_tail(self) -> bool:
        return self.order is not None and self.order.stage == len(self.order.devices) - 1

    def _load_stage(self, order: LoadStage) -> list[Instruction]:
        if order.lease < self.lease:
            return [Ignore(f"plan of lease {order.lease}: lease {self.lease} is in force")]
        if order.lease == self.lease:
            return self._report_again(order)
        self.lease = order.lease
        self._forget()
        is_stage = 0 <= order.stage < len(order.devices) or order.stage == HOLDS_EXPERTS
        if not is_stage or order.prefill_chunk_tokens < 1:
            return self._load_failed(LoadFailed(order.lease, "protocol", "the plan names no such stage"))
        self.order = order
        return [Load(order)]

    def _report_again(self, order: LoadStage) -> list[Instruction]:
        """The coordinator asks again after a broken link: the answer may have been lost with it."""
        if self.order != order:
            return [Ignore(f"plan of lease {order.lease}: it is over")]
        if self.failed is not None:
            return [self._stage_failed(self.failed)]
        if self.loaded is not None:
            return [self._stage_ready(self.loaded)]
        return [Ignore(f"plan of lease {order.lease}: already loading")]

    def _loaded(self, event: Loaded) -> list[Instruction]:
        if event.lease != self.lease or self.order is None or self.failed is not None:
            return [Ignore(f"loaded for lease {event.lease}, which is over")]
        self.loaded = event
        return [self._stage_ready(event)]

    def _load_failed(self, event: LoadFailed) -> list[Instruction]:
        if event.lease != self.lease or self.failed is not None:
            return [Ignore(f"failed for lease {event.lease}, which is over")]
        self._forget_sessions()
        self.loaded = None
        self.failed = event
        return [Unload(event.lease), self._stage_failed(event)]

    def _unload_stage(self, message: UnloadStage) -> list[Instruction]:
        if message.lease != self.lease or self.order is None:
            return [Ignore(f"unload of lease {message.lease}, which is over")]
        self._forget()
        return [Unload(message.lease)]

    @staticmethod
    def _stage_ready(loaded: Loaded) -> Send:
        ready = StageReady(
            loaded.lease,
            loaded.numeric_class,
            loaded.row_invariant,
            loaded.weight_bytes,
            loaded.kv_capacity_tokens,
        )
        return Send(COORDINATOR, ready)

    @staticmethod
    def _stage_failed(failed: LoadFailed) -> Send:
        return Send(COORDINATOR, StageFailed(failed.lease, failed.code, failed.reason, failed.hint))
