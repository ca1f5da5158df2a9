"""The planner's inputs and its answer, as values.

Knows: measured profiles of devices, links and the model; plans, predictions and reasons. Does not know: how they were
measured, or how a plan is carried out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edge_runtime.core import LayerRange
from edge_runtime.engine.base import DEFAULT_FORMATS, StageFormats


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """What one device can do, measured on a real segment of this model."""

    device_id: str
    name: str
    memory_free_bytes: int  # for weights and KV
    layer_decode_seconds: float  # one row through one layer of average weight
    layer_prefill_row_seconds: float  # per row of a full chunk
    head_seconds: float  # one row through final norm, head, sampler
    numeric_class: str
    row_invariant: bool = True
    host: str = (
        ""  # of the address it is dialled at; "" where that is unknown: it may share a machine with others
    )
    flash_bytes_per_second: float = 0.0  # of experts that stay on flash; 0: all must be in memory
    expert_cache_bytes: int = 0  # memory for those; 0: what weights and KV leave


@dataclass(frozen=True, slots=True)
class Link:
    """One way between two devices, or a device and the coordinator (`COORDINATOR`)."""

    rtt_seconds: float
    bytes_per_second: float


COORDINATOR = ""  # device id of the coordinator in a links table


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """The model as costs. Lists are per layer."""

    layer_weight_bytes: tuple[int, ...]
    embedding_bytes: int
    head_bytes: int  # beyond the embedding where the two are tied
    tied: bool
    hidden_bytes_per_row: int
    kv_bytes_per_token_per_layer: int
    kv_tokens_wanted: int  # KV room a stage must have beside its weights
    formats: StageFormats = DEFAULT_FORMATS  # of rows between layers, of keys and values
    layer_expert_bytes: tuple[int, ...] = ()  # of layer_weight_bytes: what may stay on flash; (): nothing
    layer_cycle_bytes: tuple[int, ...] = ()  # the experts that one token uses
    layer_experts: tuple[int, ...] = ()  # how many that several devices may share; (): none
    expert_loads: tuple[tuple[float, ...], ...] = ()  # each one's share of its layer's uses; (): not measured

    @property
    def num_layers(self) -> int:
        return len(self.layer_weight_bytes)


@dataclass(frozen=True, slots=True)
class Split:
    """What the caller asked for. `ranges` is only for kind "ranges"; `devices` fixes the order where given (names)."""

    kind: str = "auto"  # "auto", "even", "ranges", "experts"
    ranges: tuple[LayerRange, ...] = ()
    devices: tuple[str, ...] = ()
    replicas: int = 0  # pipelines wanted; 0: as many as cost nobody anything (`replicas.py`)


@dataclass(frozen=True, slots=True)
class StagePlan:
    device_id: str
    name: str
    layers: LayerRange
    weight_bytes: int
    kv_tokens: int  # room left for KV
    compute_seconds: float  # per decoded token
    hop_seconds: float  # from this stage to the next (the tail: back to the first)
    numeric_class: str = ""  # of the device: a replacement must match it
    flash_seconds: float = 0.0  # of compute_seconds: reading the experts that memory will probably lack
    expert_cache_bytes: int = 0  # 0: no experts, or all of them in memory


@dataclass(frozen=True, slots=True)
class HolderPlan:
    """A device that holds experts for the stages, and no layers. Stages with a cache have all on flash, too."""

    device_id: str
    name: str
    experts: int
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class ExpertsHeld:
    device_id: str  # of a stage or a holder
    layer: int
    experts: tuple[int, ...]
    of: int = 0  # how many the layer has


@dataclass(frozen=True, slots=True)
class Plan:
    """An ordered pipeline, what it should do, and why. `excluded`: device name -> the reason."""

    stages: tuple[StagePlan, ...]
    predicted_tokens_per_second: float  # one session, decoding
    predicted_prefill_tokens_per_second: float
    reasons: tuple[str, ...]
    excluded: Mapping[str, str]
    prefill_chunk_tokens: int
    formats: StageFormats = DEFAULT_FORMATS
    is_fallback: bool = False  # not the split that was asked for: that one could not be kept
    holders: tuple[HolderPlan, ...] = ()
    experts: tuple[ExpertsHeld, ...] = ()  # (): every stage holds those of its layers

    @property
    def devices(self) -> tuple[str, ...]:
        """Device ids in pipeline order."""
        return tuple(stage.device_id for stage in self.stages)

    @property
    def everyone(self) -> tuple[str, ...]:
        """Device ids of stages and holders."""
        return (*self.devices, *(holder.device_id for holder in self.holders))

    @property
    def class_map(self) -> tuple[str, ...]:
        """The numeric class of each layer, as the profiles have it."""
        return tuple(stage.numeric_class for stage in self.stages for _ in range(len(stage.layers)))


# (from device id, to device id) -> link; a missing pair is estimated through COORDINATOR
Links = Mapping[tuple[str, str], Link]
