"""How long a token takes where a device has its experts on flash and others have some in memory.

The prediction asks the function that decides while tokens are made (`edge_runtime.experts.miss_split`), with the
seconds that profiles and links promise, for each number of experts that a row may lack, weighed by how likely it is.
Each expert of a row is taken to be missing, and to be held by somebody, independently of the others.

Knows: hit rates to expect, links, profiles. Does not know: how experts were placed, or what flash and links really do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import comb

from coordinator.planning.costs import Costs
from coordinator.planning.experts import Expert, expert_bytes, load, top_k
from coordinator.planning.model import ModelProfile
from edge_runtime.experts.cost import expected_hit_rate
from edge_runtime.experts.miss_split import HereCost, Line, Miss, PeerCost, divide

NO_LIMIT = 1 << 30  # uses of one request: a token has few

# (experts missing, of which held by others, reading, each holder by uses) -> seconds of a layer
LayerSeconds = Callable[[int, int, Line, tuple[Line, ...]], float]


@dataclass(frozen=True, slots=True)
class Help:
    """Devices are indices into Costs.devices. `far`: experts that the runner's cache will probably lack."""

    runner: int
    held: dict[int, list[Expert]]  # by holder
    far: frozenset[Expert]


def seconds_per_token(costs: Costs, help_: Help, layer_seconds: LayerSeconds) -> float:
    """`layer_seconds`: `with_flash`, or `without_choice`."""
    layers, profile = costs.all_layers, costs.devices[help_.runner]
    total = costs.compute_seconds(help_.runner, layers) - costs.flash_seconds(help_.runner, layers)
    cache = costs.expert_cache_bytes(help_.runner, layers) or 0
    missed = 1.0 - expected_hit_rate(cache / max(1, costs.expert_bytes(layers)))
    held = frozenset(expert for experts in help_.held.values() for expert in experts)
    for layer, count in enumerate(costs.model.layer_experts):
        if not count:
            continue
        reading = Line(0.0, expert_bytes(costs.model, layer) / profile.flash_bytes_per_second)
        peers = tuple(_peer_line(costs, help_.runner, device, layer) for device in help_.held)
        covered = _covered(costs.model, help_.far, held, layer)
        total += sum(
            chance * others * layer_seconds(misses, asked, reading, peers)
            for misses, chance in enumerate(_binomial(top_k(costs.model, layer), missed))
            for asked, others in enumerate(_binomial(misses, covered))
        )
    return total


@lru_cache(maxsize=4096)
def with_flash(misses: int, held: int, reading: Line, peers: tuple[Line, ...]) -> float:
    """As it is decided while tokens are made."""
    wanted = [Miss(number, 1, (number % len(peers),) if number < held else ()) for number in range(misses)]
    return divide(wanted, HereCost(reading), [PeerCost(line, NO_LIMIT) for line in peers]).seconds


def without_choice(misses: int, held: int, reading: Line, peers: tuple[Line, ...]) -> float:
    """Others compute all that they hold; only the rest is read."""
    asked = [line.seconds(len(range(number, held, len(peers)))) for number, line in enumerate(peers)]
    return max([reading.seconds(misses - held), *asked])


def _covered(model: ModelProfile, far: frozenset[Expert], held: frozenset[Expert], layer: int) -> float:
    """Of the uses that the cache will lack in this layer: the share that somebody holds. Which ones these are is known
    only where it was measured which are busy."""
    everyone = [(layer, number) for number in range(model.layer_experts[layer])]
    own = [expert for expert in everyone if expert in far or not model.expert_loads]
    total = sum(load(model, expert) for expert in own)
    return sum(load(model, expert) for expert in own if expert in held) / total if total else 1.0


def _peer_line(costs: Costs, runner: int, device: int, layer: int) -> Line:
    """By uses. A holder's own computing is taken from what its layers take, by the bytes that a row touches."""
    model, link = costs.model, costs.link(runner, device)
    cycle = model.layer_cycle_bytes[layer]
    touched = model.layer_weight_bytes[layer] - model.layer_expert_bytes[layer] + cycle
    experts_seconds = costs.devices[device].layer_decode_seconds * cycle / max(1, touched)
    computing = experts_seconds / top_k(model, layer)
    return Line(link.rtt_seconds, computing + 2 * model.hidden_bytes_per_row / link.bytes_per_second)


def _binomial(count: int, chance: float) -> list[float]:
    return [comb(count, k) * chance**k * (1 - chance) ** (count - k) for k in range(count + 1)]
