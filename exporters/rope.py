"""Rotary parameters of config.json -> the table of inverse frequencies the manifest carries.

Knows: the scaling schemes of the supported families. Does not know: where the table is used.
A scheme that is not here is refused by name: a wrong guess would be silently wrong text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.bundle.manifest import Rope
from edge_runtime.errors import ExportError
from exporters.config import Settings

Frequencies = NDArray[np.float64]


def rope_of(settings: Settings, default_theta: float = 1e4) -> Rope:
    """Raises ExportError for an unknown `rope_type` or a missing parameter."""
    parameters = settings.rope(default_theta)
    scheme = _SCHEMES.get(str(parameters["rope_type"]))
    if scheme is None:
        raise ExportError(
            f"rope_type {str(parameters['rope_type'])[:40]!r} is not supported",
            hint=f"supported: {', '.join(sorted(_SCHEMES))}",
        )
    rotated = int(settings.head_dim * _number(parameters, "partial_rotary_factor"))
    theta = _number(parameters, "rope_theta")
    base = theta ** (-np.arange(0, rotated, 2, dtype=np.float64) / rotated)
    frequencies, scale = scheme(base, parameters, settings)
    return Rope(tuple(float(value) for value in frequencies.astype(np.float32)), scale)


def max_context_tokens(settings: Settings) -> int:
    """Positions the exported table is right for.

    `longrope` has one table up to the original context and another for longer sequences, all positions included; a
    session's KV can't change tables half-way, so the bundle carries the short one and stops at the original context.
    """
    if settings.get("rope_parameters") or settings.get("rope_scaling"):
        rope = settings.rope()
        if rope["rope_type"] in _LONGROPE:
            return int(_number(rope, "original_max_position_embeddings"))
    return settings.positive("max_position_embeddings")


def _default(
    base: Frequencies, parameters: Mapping[str, Any], settings: Settings
) -> tuple[Frequencies, float]:
    return base, 1.0


def _linear(
    base: Frequencies, parameters: Mapping[str, Any], settings: Settings
) -> tuple[Frequencies, float]:
    return base / _number(parameters, "factor"), 1.0


def _llama3(
    base: Frequencies, parameters: Mapping[str, Any], settings: Settings
) -> tuple[Frequencies, float]:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    factor = _number(parameters, "factor")
    low, high = _number(parameters, "low_freq_factor"), _number(parameters, "high_freq_factor")
    original = _number(parameters, "original_max_position_embeddings")
    turns = original * base / (2 * math.pi)  # full turns within the original context
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * base / factor + smooth * base, 1.0


def _yarn(base: Frequencies, parameters: Mapping[str, Any], settings: Settings) -> tuple[Frequencies, float]:
    original = _number(parameters, "original_max_position_embeddings")
    factor = _number(parameters, "factor", settings.positive("max_position_embeddings") / original)
    rotated = 2 * len(base)
    theta = _number(parameters, "rope_theta")

    def dimension(turns: float) -> float:
        return rotated * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(_number(parameters, "beta_fast", 32.0))
    high = dimension(_number(parameters, "beta_slow", 1.0))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    ramp = np.clip((np.arange(len(base)) - low) / max(high - low, 0.001), 0.0, 1.0)
    return base / factor * ramp + base * (1 - ramp), _yarn_scale(parameters, factor)


def _yarn_scale(parameters: Mapping[str, Any], factor: float) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if parameters.get("attention_factor") is not None:
        return _number(parameters, "attention_factor")
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return scale(_number(parameters, "mscale")) / scale(_number(parameters, "mscale_all_dim"))
    return scale(1.0)


def _longrope(
    base: Frequencies, parameters: Mapping[str, Any], settings: Settings
) -> tuple[Frequencies, float]:
    original = _number(parameters, "original_max_position_embeddings")
    factor = _number(parameters, "factor", settings.positive("max_position_embeddings") / original)
    short = parameters.get("short_factor")
    if not isinstance(short, list) or len(short) != len(base):
        raise ExportError(
            f"config.json: longrope needs a short_factor list of {len(base)} numbers",
            hint="download config.json again",
        )
    inferred = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return base / np.asarray(short, np.float64), _number(parameters, "attention_factor", inferred)


_SCHEMES: Mapping[str, Callable[[Frequencies, Mapping[str, Any], Settings], tuple[Frequencies, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,  # longrope's first name
}
_LONGROPE = ("longrope", "su")


def _number(parameters: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = parameters.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ExportError(
            f"config.json: the rotary parameters need a number {key}, not {str(value)[:40]!r}",
            hint="download config.json again",
        )
    return float(value)
