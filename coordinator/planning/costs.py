"""What a stage weighs and how long it takes, on one device or between two.

Decoding one token costs the sum of every stage's compute and every hop, the hop from the tail back to stage 1 (ids
only) included. A stage fits where its weights and the KV room wanted do; experts may stay on flash where a device
reads them from there, which costs time instead of memory.

Knows: the cost model. Does not know: how a good plan is found, or how it is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from coordinator.planning.model import COORDINATOR, DeviceProfile, Link, Links, ModelProfile, StagePlan
from edge_runtime.core import LayerRange
from edge_runtime.experts.cost import expected_hit_rate, missed_seconds

ID_BYTES = 64  # a message of token ids, from the tail to stage 1
UNMEASURED_LINK = Link(rtt_seconds=0.1, bytes_per_second=1e6)  # pessimistic: nobody should split over a guess

MIN_CHUNK_TOKENS = 32  # a block of the prefix chain
MAX_CHUNK_TOKENS = 512
MAX_CHUNK_BYTES = 1 << 20  # of hidden rows in one frame
MAX_CHUNK_SECONDS = 1.0  # of one stage: how long a newcomer waits, and a cancelled prompt still runs
ESTIMATED_PROMPT_TOKENS = 512
MEASURED_CHUNK_TOKENS = 128  # what layer_prefill_row_seconds is a row of


@dataclass(frozen=True, slots=True)
class Placement:
    """A device and its layers, before anything is said about it."""

    device: int  # index into Costs.devices
    layers: LayerRange


@dataclass(frozen=True)
class Costs:
    """Devices in a fixed order, links, and the model."""

    devices: Sequence[DeviceProfile]
    links: Links
    model: ModelProfile

    # ------------------------------------------------------------ memory

    def weight_bytes(self, layers: LayerRange) -> int:
        model = self.model
        has_head = layers.last == model.num_layers - 1
        total = sum(model.layer_weight_bytes[layers.first : layers.last + 1])
        if layers.first == 0 or (has_head and model.tied):
            total += model.embedding_bytes
        return total + (model.head_bytes if has_head else 0)

    def kv_bytes(self, layers: LayerRange) -> int:
        return self.model.kv_tokens_wanted * self.model.kv_bytes_per_token_per_layer * len(layers)

    def needed_bytes(self, layers: LayerRange) -> int:
        return self.weight_bytes(layers) + self.kv_bytes(layers)

    def fits(self, device: int, layers: LayerRange) -> bool:
        return self._room_bytes(device, layers) >= 0

    def expert_bytes(self, layers: LayerRange) -> int:
        """What may stay on flash."""
        return sum(self.model.layer_expert_bytes[layers.first : layers.last + 1])

    def cycle_bytes(self, layers: LayerRange) -> int:
        """The experts that one token uses."""
        return sum(self.model.layer_cycle_bytes[layers.first : layers.last + 1])

    def expert_cache_bytes(self, device: int, layers: LayerRange) -> int | None:
        """Memory for experts where some of them stay on flash; None: all are in memory."""
        profile, experts = self.devices[device], self.expert_bytes(layers)
        if not profile.flash_bytes_per_second or not experts:
            return None
        left = profile.memory_free_bytes - self.needed_bytes(layers) + experts
        cache = profile.expert_cache_bytes or left
        return None if cache >= experts else cache

    def _room_bytes(self, device: int, layers: LayerRange) -> int:
        """What is left where everything that must be in memory is; negative: that does not fit."""
        needed = self.needed_bytes(layers)
        cache = self.expert_cache_bytes(device, layers)
        if cache is not None:
            if cache < self.cycle_bytes(layers):
                return -1
            needed += cache - self.expert_bytes(layers)
        return self.devices[device].memory_free_bytes - needed

    @property
    def all_layers(self) -> LayerRange:
        return LayerRange(0, self.model.num_layers - 1)

    # ------------------------------------------------------------ time

    def relative_weight(self, layers: LayerRange) -> float:
        """In layers of average weight."""
        weights = self.model.layer_weight_bytes
        total = sum(weights)
        if total == 0:
            return float(len(layers))
        return sum(weights[layers.first : layers.last + 1]) * len(weights) / total

    def compute_seconds(self, device: int, layers: LayerRange) -> float:
        profile = self.devices[device]
        has_head = layers.last == self.model.num_layers - 1
        seconds = self.relative_weight(layers) * profile.layer_decode_seconds
        seconds += self.flash_seconds(device, layers)
        return seconds + (profile.head_seconds if has_head else 0.0)

    def flash_seconds(self, device: int, layers: LayerRange) -> float:
        """Of a token: reading the experts that memory will probably lack. Overlap is not counted on."""
        cache = self.expert_cache_bytes(device, layers)
        if cache is None:
            return 0.0
        hit_rate = expected_hit_rate(cache / self.expert_bytes(layers))
        bandwidth = self.devices[device].flash_bytes_per_second
        return missed_seconds(self.cycle_bytes(layers), hit_rate, bandwidth)

    def row_hop_seconds(self, source: int, target: int) -> float:
        return self._one_way(source, target, self.model.hidden_bytes_per_row)

    def id_hop_seconds(self, source: int, target: int) -> float:
        return self._one_way(source, target, ID_BYTES)

    def _one_way(self, source: int, target: int, size_bytes: int) -> float:
        if source == target:
            return 0.0
        link = self.link(source, target)
        return link.rtt_seconds / 2 + size_bytes / link.bytes_per_second

    def link(self, source: int, target: int) -> Link:
        """Measured, or the way through the coordinator."""
        here, there = self.devices[source].device_id, self.devices[target].device_id
        direct = self._measured(here, there)
        if direct is not None:
            return direct
        up = self._measured(here, COORDINATOR) or UNMEASURED_LINK
        down = self._measured(COORDINATOR, there) or UNMEASURED_LINK
        return Link(up.rtt_seconds + down.rtt_seconds, min(up.bytes_per_second, down.bytes_per_second))

    def _measured(self, source: str, target: str) -> Link | None:
        return self.links.get((source, target)) or self.links.get((target, source))

    def is_linked(self, device: int) -> bool:
        """Whether anything was measured about its way to the others."""
        own = self.devices[device].device_id
        return any(own in pair for pair in self.links)

    def seconds_per_token(self, placements: Sequence[Placement]) -> float:
        return sum(stage.compute_seconds + stage.hop_seconds for stage in self.stages(placements))

    # ------------------------------------------------------------ stages

    def stages(self, placements: Sequence[Placement]) -> tuple[StagePlan, ...]:
        stages = []
        for item, placement in enumerate(placements):
            device, layers = placement.device, placement.layers
            profile = self.devices[device]
            if item + 1 < len(placements):
                hop = self.row_hop_seconds(device, placements[item + 1].device)
            else:
                hop = self.id_hop_seconds(device, placements[0].device)
            stages.append(
                StagePlan(
                    device_id=profile.device_id,
                    name=profile.name,
                    layers=layers,
                    weight_bytes=self.weight_bytes(layers),
                    kv_tokens=self._kv_tokens(device, layers),
                    compute_seconds=self.compute_seconds(device, layers),
                    hop_seconds=hop,
                    numeric_class=profile.numeric_class,
                    flash_seconds=self.flash_seconds(device, layers),
                    expert_cache_bytes=self.expert_cache_bytes(device, layers) or 0,
                )
            )
        return tuple(stages)

    def _kv_tokens(self, device: int, layers: LayerRange) -> int:
        per_token = self.model.kv_bytes_per_token_per_layer * len(layers)
        if per_token == 0:
            return self.model.kv_tokens_wanted
        return self.model.kv_tokens_wanted + self._room_bytes(device, layers) // per_token

    # ------------------------------------------------------------ prefill

    def chunk_tokens(self, placements: Sequence[Placement]) -> int:
        """The power of two that has a prompt read soonest: large ones read weights less often, small ones keep all
        stages busy. What stages do about those who decode meanwhile is theirs (agent/step_pace.py): they cut chunks.
        """
        if not all(self.devices[placement.device].row_invariant for placement in placements):
            return MIN_CHUNK_TOKENS  # a fixed grid: what a row becomes would depend on the size
        sizes = [MIN_CHUNK_TOKENS]
        while sizes[-1] * 2 <= MAX_CHUNK_TOKENS and self._is_chunk_small(placements, sizes[-1] * 2):
            sizes.append(sizes[-1] * 2)
        return max(sizes, key=lambda chunk: self.prefill_tokens_per_second(placements, chunk))

    def _is_chunk_small(self, placements: Sequence[Placement], chunk_tokens: int) -> bool:
        if len(placements) > 1 and chunk_tokens * self.model.hidden_bytes_per_row > MAX_CHUNK_BYTES:
            return False
        return max(self._chunk_seconds(each, chunk_tokens) for each in placements) <= MAX_CHUNK_SECONDS

    def prefill_tokens_per_second(self, placements: Sequence[Placement], chunk_tokens: int) -> float:
        """Of a prompt of ESTIMATED_PROMPT_TOKENS, chunk after chunk through the pipeline."""
        chunks = -(-ESTIMATED_PROMPT_TOKENS // chunk_tokens)
        steps = [self._chunk_seconds(placement, chunk_tokens) for placement in placements]
        latencies, transfers = 0.0, [0.0]
        for here, there in pairwise(placements):
            link = self.link(here.device, there.device)
            latencies += link.rtt_seconds / 2
            transfers.append(chunk_tokens * self.model.hidden_bytes_per_row / link.bytes_per_second)
        seconds = sum(steps) + sum(transfers) + latencies + (chunks - 1) * max(*steps, *transfers)
        seconds += self.devices[placements[-1].device].head_seconds
        return chunks * chunk_tokens / seconds if seconds > 0 else float("inf")

    def _chunk_seconds(self, placement: Placement, rows: int) -> float:
        """Reading the weights, which a single row pays for alone, and computing each row."""
        profile = self.devices[placement.device]
        reading = max(0.0, profile.layer_decode_seconds - profile.layer_prefill_row_seconds)
        row_seconds = profile.layer_prefill_row_seconds - reading / MEASURED_CHUNK_TOKENS
        seconds = reading + rows * max(row_seconds, 0.0)
        return self.relative_weight(placement.layers) * seconds
