"""How often each expert was used: measured by `doctor experts`, read by the planner that spreads experts over devices.

Knows: counts by layer, and their file. Does not know: how they were counted, or what follows from them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ConfigError

_PRIOR = 0.5  # uses that every expert is given: one that a short text never needed may still be needed


@dataclass(frozen=True, slots=True)
class ExpertLoads:
    """`uses[layer][expert]`; a layer without experts has none. `bundle`: digest of the manifest they are of."""

    bundle: str
    uses: tuple[tuple[int, ...], ...]

    def shares(self) -> tuple[tuple[float, ...], ...]:
        """Of each layer's uses; they sum to one where there are any."""
        totals = [sum(layer) + _PRIOR * len(layer) for layer in self.uses]
        return tuple(
            tuple((count + _PRIOR) / total for count in layer)
            for layer, total in zip(self.uses, totals, strict=True)
        )


def counted(
    bundle: str, routing: NDArray[np.int32], layers: Sequence[int], counts: Sequence[int], num_layers: int
) -> ExpertLoads:
    """Routing [tokens, layers with experts, top_k]; `layers` and `counts`: which these are, and their experts."""
    uses: list[tuple[int, ...]] = [()] * num_layers
    for item, (layer, count) in enumerate(zip(layers, counts, strict=True)):
        uses[layer] = tuple(np.bincount(routing[:, item].reshape(-1), minlength=count).tolist())
    return ExpertLoads(bundle, tuple(uses))


def write_loads(path: Path, loads: ExpertLoads) -> None:
    """Raises OSError."""
    path.write_text(json.dumps({"bundle": loads.bundle, "uses": loads.uses}) + "\n", encoding="utf-8")


def read_loads(path: Path, bundle: str, experts: Sequence[int]) -> ExpertLoads:
    """Of this bundle, whose layers have so many experts. Raises ConfigError."""
    hint = "`edge-runtime doctor experts BUNDLE --loads FILE` makes one"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        loads = ExpertLoads(str(document["bundle"]), tuple(tuple(layer) for layer in document["uses"]))
        fits = [len(layer) for layer in loads.uses] == list(experts)
        whole = all(type(count) is int and count >= 0 for layer in loads.uses for count in layer)
    except (OSError, ValueError, TypeError, KeyError) as problem:
        raise ConfigError(f"{path} is no file of expert loads: {problem}", hint=hint) from None
    if loads.bundle != bundle:
        raise ConfigError(f"{path} is about another bundle", hint=hint)
    if not fits or not whole:
        raise ConfigError(f"{path} does not fit the bundle's layers", hint=hint)
    return loads
